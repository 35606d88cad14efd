"""What transformers logs on a load is kept from the log, and the one cause is found in it."""

import logging

from fp8kv.calibrate.modeling.load_report import (
    conversion_failure,
    is_out_of_memory,
    load_report,
)

LOGGER = logging.getLogger("transformers.modeling_utils")


def test_the_report_is_kept_from_the_log_while_it_is_open(caplog):
    with load_report() as text:
        LOGGER.warning("a table of %d weights", 7)
    LOGGER.warning("what comes later")
    assert text == ["a table of 7 weights"]
    assert "a table" not in caplog.text


def test_it_is_given_up_after_an_error():
    filters = list(LOGGER.filters)
    try:
        with load_report():
            raise KeyError
    except KeyError:
        pass
    assert LOGGER.filters == filters


def test_the_weight_that_could_not_be_merged_is_named():
    report = ["LOAD REPORT", "Error on tensors destined for model.layers.0.mlp.experts.up. Ckpt: 3"]
    assert conversion_failure(report) == (
        "the tensors that make up model.layers.0.mlp.experts.up do not fit together or are not all there; "
        "is the download complete?"
    )
    assert conversion_failure(["all is well"]) is None


def test_want_of_memory_is_told_from_other_failures():
    assert is_out_of_memory(["...", "torch.OutOfMemoryError: CUDA out of memory"])
    assert not is_out_of_memory(["RuntimeError: sizes of tensors must match"])
