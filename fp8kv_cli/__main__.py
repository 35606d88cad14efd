"""``python -m fp8kv``: the same program as the ``fp8kv`` script."""

from fp8kv.main import main

main()
