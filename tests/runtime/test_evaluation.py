"""Running arms on the same problems."""

import dataclasses

import pytest
import torch

from fp8kv.demo import TEST_DATA, TRAIN_DATA
from fp8kv.recipes.errors import EvaluationError
from fp8kv.runtime import evaluation
from fp8kv.runtime.emulated_cache import CacheMode, fp8_at_unit_scale, unquantised
from fp8kv.runtime.evaluation import EvaluationTask, run_arms, stop_strings
from fp8kv.runtime.gsm8k import STOPS, build_prompts, load_problems
from fp8kv.runtime.samples import SampleLog


@pytest.fixture(scope="module")
def task():
    """Three problems of different lengths, answers cut short."""
    problems = load_problems(TEST_DATA)[:3]
    prompts = build_prompts(problems, load_problems(TRAIN_DATA), 1)
    return EvaluationTask(problems, prompts, STOPS, max_new_tokens=8, batch_size=2)


@pytest.fixture
def generated(monkeypatch):
    """Count the prompts that are really generated for."""
    prompts_seen = []
    generate = evaluation.generate_greedy

    def counted(model, tokenizer, prompts, **keywords):
        prompts_seen.extend(prompts)
        return generate(model, tokenizer, prompts, **keywords)

    monkeypatch.setattr(evaluation, "generate_greedy", counted)
    return prompts_seen


def saturating(facts, name="fp8"):
    """A cache that clips nearly everything: 448 times 2**-13."""
    scale = torch.tensor([2.0**-13])
    fmt = fp8_at_unit_scale().fmt
    return CacheMode(name, fmt, {layer.name: (scale, scale) for layer in facts.layers})


def run(loaded, modes, task, **keywords):
    return run_arms(loaded.model, loaded.tokenizer, loaded.facts, modes, task, **keywords)


@pytest.mark.parametrize("fixture", ["minimax", "deepseek"])
def test_a_bad_cache_shows_beside_the_baseline(request, task, fixture):
    loaded = request.getfixturevalue(fixture)

    results, scores = run(
        loaded, [unquantised(), fp8_at_unit_scale(), saturating(loaded.facts)], task
    )

    assert list(results) == list(scores) == ["bf16", "fp8-unit", "fp8"]
    base, unit, bad = (result.agreement for result in results.values())
    assert (base.kl, base.kl_max, base.top1_baseline) == (0.0, 0.0, 1.0)
    assert base.num_tokens == unit.num_tokens == bad.num_tokens > 50
    assert 0 < unit.kl < 1e-3 < 0.5 < bad.kl
    assert base.nll < 0.1 < 1 < bad.nll
    assert bad.top1_reference < 0.9 * base.top1_reference


def test_problems_keep_their_order_whatever_order_they_run_in(minimax, task, monkeypatch):
    lengths = [len(prompt) for prompt in task.prompts]
    assert lengths != sorted(lengths), "they run in another order"
    known = dict(zip(task.prompts, task.problems, strict=True))

    def answer(model, tokenizer, prompts, **keywords):
        return [f" {known[prompt].answer} Question: and more" for prompt in prompts]

    monkeypatch.setattr(evaluation, "generate_greedy", answer)
    log = _Memory()

    _, scores = run(minimax, [unquantised()], task, log=log)

    assert [score.strict for score in scores["bf16"]] == [True] * len(task.problems)
    for index, problem in enumerate(task.problems):
        assert log.texts["bf16", index] == f" {problem.answer} ", "cut at the stop string"


def test_without_a_baseline_there_is_no_agreement(minimax, task):
    results, _ = run(minimax, [fp8_at_unit_scale()], task)

    assert results["fp8-unit"].agreement is None


def test_progress_adds_up_for_every_task(minimax, task):
    told = {}

    def progress(name, count):
        told[name] = told.get(name, 0) + count

    run(minimax, [unquantised(), fp8_at_unit_scale()], task, progress=progress)

    assert told == {"agreement": 3, "bf16": 3, "fp8-unit": 3}


def test_an_interrupted_run_generates_only_what_is_missing(minimax, task, generated, tmp_path):
    path = tmp_path / "answers.jsonl"
    whole, _ = run(minimax, [unquantised()], task, log=SampleLog(path, "run"))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:20])
    generated.clear()
    told = []

    results, _ = run(
        minimax,
        [unquantised()],
        task,
        log=SampleLog(path, "run"),
        progress=lambda name, count: told.append(count) if name == "bf16" else None,
    )

    assert len(generated) == 2
    assert told == [1, 2], "the answer that was there, then the others"
    assert dataclasses.replace(results["bf16"], seconds=0) == dataclasses.replace(
        whole["bf16"], seconds=0
    )
    assert sorted(path.read_bytes().splitlines()) == sorted(b"".join(lines).splitlines())


def test_the_model_is_as_before_afterwards(deepseek, task):
    before = deepseek.model.config._attn_implementation

    run(deepseek, [fp8_at_unit_scale()], dataclasses.replace(task, max_new_tokens=1))

    assert deepseek.model.config._attn_implementation == before
    assert not any(module._forward_pre_hooks for module in deepseek.model.modules())


def test_two_arms_of_one_name_are_refused(minimax, task, generated):
    with pytest.raises(EvaluationError, match="an arm appears twice: bf16, bf16"):
        run(minimax, [unquantised(), unquantised()], task)
    assert not generated


def test_no_problems_are_refused(minimax):
    with pytest.raises(EvaluationError, match="no problems to evaluate"):
        run(minimax, [unquantised()], EvaluationTask([], [], STOPS))


def test_stops_are_the_harness_and_the_tokenizers_end(minimax):
    assert stop_strings(minimax.tokenizer) == (*STOPS, "<|eos|>")

    class NoEnd:
        eos_token = None

    assert stop_strings(NoEnd()) == STOPS


class _Memory:
    """A log that keeps everything in memory and knows nothing at the start."""

    def __init__(self):
        self.texts = {}

    def known(self, arm, prompts):
        return {}

    def append(self, arm, index, prompt, text):
        self.texts[arm, index] = text
