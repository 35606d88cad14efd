"""The one exception family of fp8kv.

Every error that a user can cause is a subclass of :class:`Fp8kvError` whose message is one sentence that names
the culprit (file, layer, key, value) and the remedy. The command line prints it without a traceback and
exits with status 3. Anything else that escapes is a bug and keeps its traceback.
"""


class Fp8kvError(Exception):
    """Base of all errors that fp8kv raises on purpose."""


class RecipeError(Fp8kvError):
    """A recipe is missing, malformed, or disagrees with the checkpoint."""


class CheckpointError(Fp8kvError):
    """A checkpoint cannot be read: missing, truncated, corrupt, unsafe, or of an unknown layout."""


class UnsupportedModelError(CheckpointError):
    """The checkpoint is sound, but its architecture or quantisation cannot carry static KV scales."""


class DataError(Fp8kvError):
    """A dataset is missing, empty, too small, or has no usable column."""


class CalibrationError(Fp8kvError):
    """Measuring failed: a layer recorded nothing, or recorded NaN or Inf."""


class StatisticsError(Fp8kvError):
    """A statistics file is malformed, or two of them cannot be merged."""


class ScaleError(Fp8kvError):
    """A scale is not finite, not positive, or breaks the MLA rule."""


class OutputError(Fp8kvError):
    """An output cannot be written: it exists, equals the source, or the disk is full."""


class EvaluationError(Fp8kvError):
    """An evaluation cannot run on this model or data."""


class RequestError(Fp8kvError):
    """A request to the engine, or a setting of the engine, is malformed or can never be served."""
