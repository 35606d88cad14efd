"""The log of answers, and going on from it."""

import json

import pytest

from fp8kv.recipes.errors import EvaluationError, OutputError
from fp8kv.runtime.evaluation.samples import SampleLog, check_writable

PROMPTS = ["one?", "two?", "three?"]
AWKWARD = 'a\nb "c" \u2028 é \x00 \ud83d\ude00'


@pytest.fixture
def path(tmp_path):
    return tmp_path / "answers.jsonl"


def log_with(path, count, run="run"):
    log = SampleLog(path, run)
    for index in range(count):
        log.append("fp8", index, PROMPTS[index], f"answer {index}")
    return log


def test_a_second_run_knows_the_answers_of_the_first(path):
    log_with(path, 2)

    assert SampleLog(path, "run").known("fp8", PROMPTS) == {0: "answer 0", 1: "answer 1"}


def test_answers_belong_to_their_arm_and_their_prompt(path):
    log_with(path, 2)
    log = SampleLog(path, "run")

    assert log.known("bf16", PROMPTS) == {}
    assert log.known("fp8", ["one?", "another?"]) == {0: "answer 0"}
    assert log.known("fp8", ["two?", "one?"]) == {}


def test_a_new_log_writes_no_file_before_the_first_answer(path):
    assert SampleLog(path, "run").known("fp8", PROMPTS) == {}
    assert not path.exists()


def test_any_text_survives(path):
    text = AWKWARD.encode("utf-16", "surrogatepass").decode("utf-16")
    SampleLog(path, "run").append("fp8", 0, "one?", text)

    assert SampleLog(path, "run").known("fp8", PROMPTS) == {0: text}
    assert len(path.read_bytes().splitlines()) == 1


def test_the_last_answer_to_a_prompt_wins(path):
    log = log_with(path, 1)
    log.append("fp8", 0, PROMPTS[0], "better")

    assert SampleLog(path, "run").known("fp8", PROMPTS) == {0: "better"}


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_line_that_was_cut_off_is_made_again(path, cut):
    log_with(path, 3)
    path.write_bytes(path.read_bytes()[:-cut])

    log = SampleLog(path, "run")

    assert log.known("fp8", PROMPTS) == {0: "answer 0", 1: "answer 1"}
    log.append("fp8", 2, PROMPTS[2], "again")
    assert SampleLog(path, "run").known("fp8", PROMPTS)[2] == "again"
    lines = path.read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == [0, 1, 2]


def test_a_file_of_nothing_but_a_cut_line_is_empty(path):
    log_with(path, 1)
    path.write_bytes(path.read_bytes()[:20])

    assert SampleLog(path, "run").known("fp8", PROMPTS) == {}
    assert path.read_bytes() == b""


def test_answers_of_another_run_are_refused_and_kept(path):
    log_with(path, 2)
    before = path.read_bytes()

    with pytest.raises(
        EvaluationError, match=r"answers of another run .* name another file or delete it"
    ):
        SampleLog(path, "other run")

    assert path.read_bytes() == before


@pytest.mark.parametrize("line", ["{}", "[]", "words", '{"run": "run", "arm": "fp8"}'])
def test_a_file_of_another_kind_is_refused_and_kept(path, line):
    content = log_with(path, 1) and path.read_text() + line + "\n"
    path.write_text(content)

    with pytest.raises(EvaluationError, match=r"line 2, is not an answer .* name another file"):
        SampleLog(path, "run")

    assert path.read_text() == content


@pytest.mark.parametrize("before", ["", '{"run": "other"\n', "\n"])
def test_a_file_of_another_kind_without_a_last_newline_is_kept(path, before):
    path.write_text(before + "notes of somebody")

    with pytest.raises(EvaluationError, match=r"line [12], is not an answer .* name another file"):
        SampleLog(path, "run")

    assert path.read_text() == before + "notes of somebody"


def test_a_folder_is_no_log(tmp_path):
    with pytest.raises(OutputError, match=r"cannot read .*: Is a directory"):
        SampleLog(tmp_path, "run")
    with pytest.raises(OutputError, match=r"cannot write .*: Is a directory"):
        check_writable(tmp_path)


def test_a_log_can_be_tried_without_harm(path):
    check_writable(path)
    log_with(path, 2)
    check_writable(path)

    assert SampleLog(path, "run").known("fp8", PROMPTS) == {0: "answer 0", 1: "answer 1"}
    with pytest.raises(OutputError, match=r"cannot write .*answers\.jsonl: No such file"):
        check_writable(path.parent / "absent" / "answers.jsonl")


def test_a_place_that_cannot_be_written_is_an_error(tmp_path):
    log = SampleLog(tmp_path / "absent" / "answers.jsonl", "run")

    with pytest.raises(OutputError, match=r"cannot write .*answers\.jsonl: No such file"):
        log.append("fp8", 0, "one?", "1")
