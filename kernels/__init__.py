"""GPU mathematics of fp8kv: FP8 formats and, with Triton, the attention and cache kernels.

``fp8kv.kernels.fp8`` needs torch alone.
"""

if __name__ == "kernels":
    # Somebody has the repository root on ``sys.path`` and asked for the Hugging Face package of the same name
    # (transformers does, at import). Hand over the real one where it is installed.
    import importlib.machinery as _machinery
    import importlib.util as _util
    import os as _os
    import sys as _sys

    _root = _os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))
    _paths = [path for path in _sys.path if _os.path.abspath(path or ".") != _root]
    _spec = _machinery.PathFinder.find_spec("kernels", _paths)
    if _spec is not None and _spec.loader is not None and _spec.origin is not None:
        _module = _util.module_from_spec(_spec)
        _sys.modules["kernels"] = _module
        _spec.loader.exec_module(_module)
