"""The gsm8k protocol against lm-evaluation-harness 0.4.13, by golden values and, if installed, live."""

import hashlib
import json
import re
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8kv.recipes.errors import DataError, EvaluationError
from fp8kv.runtime.evaluation import gsm8k
from fp8kv.runtime.evaluation.gsm8k import Problem, Score, build_prompts, load_problems, score

# Golden values were produced by lm_eval 0.4.13 on the packaged problems, joined by a zero byte:
# whole prompts, shots from the training sample or from the evaluated file itself.
FIRST_20_PROMPTS = {
    (0, False): "99b29824b949401ecfb853e9d8d9b1f35fee137c83bdf50b08d30fbf8ad4475e",
    (1, False): "11de4627a6fe6ba699be5823e94bb0eeedd5b1d11854742d494c8ee8ec0689cb",
    (5, False): "a0e6420e551dd295390ea3d1e38e82103fe148ba5b5abb6e17e56a6c2ba2bd8f",
    (8, False): "6a5790063adf37b731a2bdd228227734afaa3fb302773e0db6af2a51cd46747a",
    (1, True): "467c751bfad34121472aae25a16759d52953674dd6a28c8c26f82bcfe8669081",
    (5, True): "fe6860d6d3f28075f69f84d02fed93d3d944694d6de657a6125fc875b51dc9c7",
    (8, True): "553257aca565e62fcc0aaabaea3feab0cfaa38cbfe0960abdab94cf25d5312cb",
}

# (generated, reference number): (strict, flexible, strict answer, flexible answer), from lm_eval.
GOLDEN_SCORES = {
    (" It is 18.\n#### 18", "6*3 = <<6*3=18>>18.\n#### 18"): (True, True, "18", "18"),
    (" #### 18.", "6*3 = <<6*3=18>>18.\n#### 18"): (True, True, "18.", "18."),
    (" #### 18,", "6*3 = <<6*3=18>>18.\n#### 18"): (True, True, "18,", "18,"),
    (" #### 1,234.", "#### 1234"): (True, True, "1,234.", "1,234."),
    (" #### 1234", "#### 1,234"): (True, True, "1234", "1234"),
    ("#### -5", "#### -5"): (True, True, "-5", "-5"),
    ("#### -5", "#### 5"): (False, False, "-5", "-5"),
    ("#### - 5", "#### 5"): (False, True, None, "5"),
    ("$5.00", "#### 5"): (False, False, None, "$5.00"),
    ("The cost is $18.", "6*3 = <<6*3=18>>18.\n#### 18"): (False, True, None, "$18."),
    ("$18", "6*3 = <<6*3=18>>18.\n#### 18"): (False, True, None, "$18"),
    ("$ 18", "6*3 = <<6*3=18>>18.\n#### 18"): (False, True, None, "18"),
    ("#### $18", "6*3 = <<6*3=18>>18.\n#### 18"): (False, True, None, "$18"),
    ("#### 18$", "6*3 = <<6*3=18>>18.\n#### 18"): (True, True, "18", "18$"),
    ("", "6*3 = <<6*3=18>>18.\n#### 18"): (False, False, None, None),
    ("I do not know.", "6*3 = <<6*3=18>>18.\n#### 18"): (False, False, None, None),
    ("...", "6*3 = <<6*3=18>>18.\n#### 18"): (False, False, None, "..."),
    ("#### ,", "6*3 = <<6*3=18>>18.\n#### 18"): (False, False, ",", None),
    ("$$", "6*3 = <<6*3=18>>18.\n#### 18"): (False, False, None, "$$"),
    ("#### 17\n#### 18", "6*3 = <<6*3=18>>18.\n#### 18"): (False, True, "17", "18"),
    ("#### 18\n#### 17", "6*3 = <<6*3=18>>18.\n#### 18"): (True, False, "18", "17"),
    ("#### 18 or 17", "6*3 = <<6*3=18>>18.\n#### 18"): (True, False, "18", "17"),
    ("18 and #### 19", "6*3 = <<6*3=18>>18.\n#### 18"): (False, False, "19", "19"),
    ("#### 18\n\nQuestion: Next?\nAnswer: 7\n#### 7", "6*3 = <<6*3=18>>18.\n#### 18"): (
        True,
        True,
        "18",
        "18",
    ),
    ("#### 18</s>#### 7", "6*3 = <<6*3=18>>18.\n#### 18"): (True, True, "18", "18"),
    ("#### 18<|im_end|>\n7", "6*3 = <<6*3=18>>18.\n#### 18"): (True, True, "18", "18"),
    ("Question: #### 18", "6*3 = <<6*3=18>>18.\n#### 18"): (False, False, None, None),
    ("####18", "6*3 = <<6*3=18>>18.\n#### 18"): (False, True, None, "18"),
    ("####  18", "6*3 = <<6*3=18>>18.\n#### 18"): (False, True, None, "18"),
    ("### 18", "6*3 = <<6*3=18>>18.\n#### 18"): (False, True, None, "18"),
    ("#### 18 apples", "6*3 = <<6*3=18>>18.\n#### 18"): (True, True, "18", "18"),
    ("#### 18.0", "6*3 = <<6*3=18>>18.\n#### 18"): (False, False, "18.0", "18.0"),
    ("#### 18.00", "6*3 = <<6*3=18>>18.\n#### 18"): (False, False, "18.00", "18.00"),
    ("#### 018", "6*3 = <<6*3=18>>18.\n#### 18"): (False, False, "018", "018"),
    ("#### .18", "6*3 = <<6*3=18>>18.\n#### 18"): (False, False, ".18", ".18"),
    ("#### 1 8", "6*3 = <<6*3=18>>18.\n#### 18"): (False, False, "1", "8"),
    ("#### 18\r\n", "6*3 = <<6*3=18>>18.\n#### 18"): (True, True, "18", "18"),
    ("#### \u0661\u0668", "6*3 = <<6*3=18>>18.\n#### 18"): (False, False, None, None),
    ("\u0661\u0668", "6*3 = <<6*3=18>>18.\n#### 18"): (False, False, None, None),
    ("#### 1e3", "#### 1000"): (False, False, "1", "3"),
    ("10-18", "6*3 = <<6*3=18>>18.\n#### 18"): (False, False, None, "-18"),
    ("--18", "6*3 = <<6*3=18>>18.\n#### 18"): (False, False, None, "-18"),
    ("-18", "6*3 = <<6*3=18>>18.\n#### 18"): (False, False, None, "-18"),
    ("5-18", "6*3 = <<6*3=18>>18.\n#### 18"): (False, False, None, "-18"),
    ("18%", "6*3 = <<6*3=18>>18.\n#### 18"): (False, True, None, "18"),
    ("2/18", "6*3 = <<6*3=18>>18.\n#### 18"): (False, True, None, "18"),
    ("9", "#### 9"): (False, True, None, "9"),
    ("-9", "#### -9"): (False, True, None, "-9"),
    ("a 9.", "#### 9"): (False, True, None, "9."),
    ("#### 18", "#### 18 "): (False, False, "18", "18"),
    ("#### 18", "#### 18."): (True, True, "18", "18"),
    ("#### 18", "####18"): (False, False, "18", "18"),
    ("#### 18", "18"): (True, True, "18", "18"),
    ("#### 18", "#### $18"): (True, True, "18", "18"),
    ("#### 18", "a #### 7 #### 18"): (True, True, "18", "18"),
    ("#### 18", "#### 18\nmore"): (False, False, "18", "18"),
    ("[invalid]", "6*3 = <<6*3=18>>18.\n#### 18"): (False, False, None, None),
    ("nothing", "[INVALID]"): (True, True, None, None),
    ("#### 2", "no number"): (False, False, "2", "2"),
    ("18\n\n\n", "#### 18"): (False, True, None, "18"),
    ("#### 18,000.50.", "#### 18000.50"): (True, True, "18,000.50.", "18,000.50."),
    ("18.5.", "#### 18.5"): (False, True, None, "18.5."),
    ("#### 18..", "#### 18"): (False, False, "18..", "18.."),
}

SHOTS = [Problem(f"What is {i} plus 0?", f"It is {i}.\n#### {i}") for i in range(9)]


def shots_and_problems() -> tuple[tuple[Problem, ...], tuple[Problem, ...]]:
    data = resources.files("fp8kv.demo") / "data"
    with (
        resources.as_file(data / "gsm-synth-train.jsonl") as shots,
        resources.as_file(data / "gsm-synth-test.jsonl") as problems,
    ):
        return load_problems(shots), load_problems(problems)


class TestPrompts:
    @pytest.mark.parametrize(("num_fewshot", "same_split"), FIRST_20_PROMPTS)
    def test_are_those_of_the_harness(self, num_fewshot: int, same_split: bool) -> None:
        shots, problems = shots_and_problems()
        pool = problems if same_split else shots
        prompts = build_prompts(problems[:20], pool, num_fewshot, same_split=same_split)
        found = hashlib.sha256("\0".join(prompts).encode()).hexdigest()
        assert found == FIRST_20_PROMPTS[num_fewshot, same_split]

    def test_hold_each_shot_with_its_answer_verbatim_and_end_before_the_space(self) -> None:
        shot = Problem("1+1?", " Spaces  stay.\n#### 2 ")
        (prompt,) = build_prompts([Problem("2+2?", "#### 4")], [shot], 1)
        assert prompt == (
            "Question: 1+1?\nAnswer:  Spaces  stay.\n#### 2 \n\nQuestion: 2+2?\nAnswer:"
        )

    def test_of_a_limited_run_are_the_first_of_the_whole_run(self) -> None:
        asked = [Problem(str(i), "#### 1") for i in range(6)]
        assert build_prompts(asked[:4], SHOTS, 3) == build_prompts(asked, SHOTS, 3)[:4]

    def test_differ_for_equal_problems_at_other_positions(self) -> None:
        first, second = build_prompts([SHOTS[0], SHOTS[0]], SHOTS, 5)
        assert first != second

    def test_never_show_a_problem_its_own_answer_within_one_split(self) -> None:
        prompts = build_prompts(SHOTS, SHOTS, 8, same_split=True)
        for problem, prompt in zip(SHOTS, prompts, strict=True):
            assert prompt.count(problem.question) == 1
            assert prompt.count("Question: ") == 9

    def test_survive_copies_of_the_problem_in_its_own_split(self) -> None:
        # Three copies: four draws can leave fewer than three others, and then all are drawn anew.
        # The shots' numbers are those that lm_eval's sampler draws.
        pool = [SHOTS[0]] * 3 + SHOTS[1:5]
        drawn = [
            [4, 1, 2],
            [2, 4, 3],
            [1, 4, 2],
            [3, 2, 1],
            [1, 3, 2],
            [1, 3, 4],
            [1, 3, 2],
            [2, 4, 1],
        ]
        for prompt, numbers in zip(
            build_prompts([SHOTS[0]] * 8, pool, 3, same_split=True), drawn, strict=True
        ):
            assert re.findall(r"What is (\d) plus", prompt) == [*map(str, numbers), "0"]

    @pytest.mark.parametrize(
        ("pool", "num_fewshot", "same_split"),
        [
            (SHOTS, 10, False),
            (SHOTS, 9, True),
            ([SHOTS[0]] * 9, 2, True),
            ([], 1, False),
        ],
    )
    def test_are_refused_where_the_pool_is_too_small(
        self, pool: list[Problem], num_fewshot: int, same_split: bool
    ) -> None:
        with pytest.raises(DataError, match="give a larger shots file or fewer shots"):
            build_prompts([SHOTS[0]], pool, num_fewshot, same_split=same_split)

    def test_need_no_pool_without_shots(self) -> None:
        assert build_prompts([SHOTS[3]], [], 0) == ["Question: What is 3 plus 0?\nAnswer:"]

    def test_refuse_a_negative_number_of_shots(self) -> None:
        with pytest.raises(EvaluationError, match="number of shots is -1"):
            build_prompts(SHOTS, SHOTS, -1)

    def test_and_the_reference_continuation_make_a_shot(self) -> None:
        (prompt,) = build_prompts([SHOTS[1]], SHOTS[:1], 1)
        shot = gsm8k.question_prompt(SHOTS[0]) + gsm8k.reference_continuation(SHOTS[0])
        assert prompt == f"{shot}\n\n{gsm8k.question_prompt(SHOTS[1])}"


class TestScore:
    @pytest.mark.parametrize(("generated", "reference"), GOLDEN_SCORES)
    def test_is_that_of_the_harness(self, generated: str, reference: str) -> None:
        cut = gsm8k.truncate_at_stop(generated)
        assert score(cut, Problem("?", reference)) == Score(*GOLDEN_SCORES[generated, reference])

    def test_of_a_reference_answer_itself_is_right_under_both_filters(self) -> None:
        _, problems = shots_and_problems()
        for problem in problems:
            found = score(gsm8k.reference_continuation(problem), problem)
            assert (found.strict, found.flexible) == (True, True)

    @given(st.integers(-(10**9), 10**9), st.text(max_size=40).filter(lambda t: "#### " not in t))
    def test_finds_the_number_after_any_text(self, number: int, text: str) -> None:
        found = score(f"{text}\n#### {number}", Problem("?", f"#### {number:,}"))
        assert (found.strict, found.flexible) == (True, True)


class TestTruncateAtStop:
    @pytest.mark.parametrize(
        ("text", "kept"),
        [
            (" 4\n#### 4\n\nQuestion: next?\nAnswer: 5", " 4\n#### 4\n\n"),
            ("a<|im_end|>b</s>c", "a"),
            ("a</s>b<|im_end|>c", "a"),
            ("Question:", ""),
            ("question: stays", "question: stays"),
            ("", ""),
        ],
    )
    def test_keeps_what_precedes_every_stop(self, text: str, kept: str) -> None:
        assert gsm8k.truncate_at_stop(text) == kept

    def test_takes_other_stops_and_ignores_empty_ones(self) -> None:
        assert gsm8k.truncate_at_stop("a<eos>b", [*gsm8k.STOPS, "", "<eos>"]) == "a"

    def test_takes_overlapping_stops_out_in_turn(self) -> None:
        # "ab" starts earlier, but is gone once "bc" was taken out.
        assert gsm8k.truncate_at_stop("xabc", ["bc", "ab"]) == "xa"


class TestLoadProblems:
    def write(self, directory: Path, content: str | bytes) -> Path:
        path = directory / "problems.json"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def test_reads_json_lines_and_skips_blank_lines_and_other_keys(self, tmp_path: Path) -> None:
        lines = '{"question": "a?", "answer": "#### 1", "template": 7}\r\n\n{"answer": "2", "question": "b?"}'
        expected = (Problem("a?", "#### 1"), Problem("b?", "2"))
        assert load_problems(self.write(tmp_path, lines)) == expected
        assert (
            load_problems(str(self.write(tmp_path, b"\xef\xbb\xbf" + lines.encode()))) == expected
        )

    def test_reads_a_json_array(self, tmp_path: Path) -> None:
        records = [{"question": f"{i}?", "answer": str(i)} for i in range(3)]
        path = self.write(tmp_path, "\n " + json.dumps(records, indent=2))
        assert load_problems(path) == tuple(Problem(f"{i}?", str(i)) for i in range(3))

    def test_keeps_line_separators_inside_a_text(self, tmp_path: Path) -> None:
        text = "a\u2028b\u0085c"
        line = json.dumps({"question": text, "answer": "1"}, ensure_ascii=False)
        path = self.write(tmp_path, line + "\n")
        assert load_problems(path) == (Problem(text, "1"),)

    GOOD = '{"question": "a?", "answer": "1"}\n'

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("", "holds no problems"),
            ("\n \n", "holds no problems"),
            ("[]", "holds no problems"),
            (
                GOOD + "\n" + '{"question": "b?", "ans',
                r"line 3 of .*problems.json is not valid JSON",
            ),
            (GOOD + '{"question": "b?", "answer": "1"', "is the file cut off"),
            (
                GOOD + '{"q": "b?", "answer": "1"}',
                "line 2 of .* has no 'question', only 'q', 'answer'",
            ),
            (GOOD + '{"question": "b?"}', "line 2 of .* has no 'answer'"),
            ("{}", "line 1 of .* has no 'question', only nothing"),
            (GOOD + '["b?", "1"]', "line 2 of .* is not a JSON object"),
            ('{"question": "b?", "answer": 1}', "line 1 of .*: 'answer' is not a text"),
            ('{"question": " ", "answer": "1"}', "line 1 of .*: 'question' is not a text"),
            ('{"question": "b?", "answer": null}', "'answer' is not a text"),
            ('{"question": "\\ud83d", "answer": "1"}', "half a surrogate pair"),
            (
                '[{"question": "a?", "answer": "1"}, {"question": "b?"}]',
                "record 2 of .* no 'answer'",
            ),
            ('[{"question": "a?",\n "answer": }]', "not valid JSON .* at line 2 column 12"),
            ("[" * 100_000, "not valid JSON"),
            ('{"question": ' + "9" * 5000 + "}", "line 1 of .* is not valid JSON"),
            (b"PAR1\x15\x04\xff\xfe", "is not UTF-8 text"),
        ],
    )
    def test_names_the_line_and_the_fault(
        self, tmp_path: Path, content: str | bytes, message: str
    ) -> None:
        with pytest.raises(DataError, match=message):
            load_problems(self.write(tmp_path, content))

    def test_names_a_file_that_cannot_be_read(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"gone\.jsonl: No such file"):
            load_problems(tmp_path / "gone.jsonl")
        with pytest.raises(DataError, match="cannot read problems from"):
            load_problems(tmp_path)


class TestProtocolDigest:
    PROMPTS = ("a", "b")
    PROBLEMS = (Problem("x", "#### 1"), Problem("y", "#### 2"))

    def test_is_stable(self) -> None:
        assert gsm8k.protocol_digest(self.PROMPTS, self.PROBLEMS) == (
            "9f27971ca72a5674b45e7944ed2e6f7ea1af261dcb4694f518e1a50c19f3af95"
        )

    def test_changes_with_everything_that_shapes_the_numbers(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        digest = gsm8k.protocol_digest
        other_answer = (self.PROBLEMS[0], Problem("y", "#### 3"))
        found = [
            digest(self.PROMPTS, self.PROBLEMS),
            digest(("a", "B"), self.PROBLEMS),
            digest(("b", "a"), self.PROBLEMS),
            digest(self.PROMPTS, other_answer),
            digest(self.PROMPTS, self.PROBLEMS, stops=[*gsm8k.STOPS, "<eos>"]),
            digest(self.PROMPTS, self.PROBLEMS, max_new_tokens=255),
        ]
        monkeypatch.setattr(gsm8k, "_STRICT_PATTERN", "other")
        found.append(digest(self.PROMPTS, self.PROBLEMS))
        assert len(set(found)) == len(found)

    def test_refuses_prompts_of_other_problems(self) -> None:
        with pytest.raises(EvaluationError, match="3 prompts do not belong to 2 problems"):
            gsm8k.protocol_digest(("a", "b", "c"), self.PROBLEMS)


class TestAgainstTheHarness:
    """Compare with lm_eval itself, where it is installed."""

    def task(self, directory: Path, monkeypatch: pytest.MonkeyPatch, fewshot_split: str):
        lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
        import datasets.load
        import yaml
        from lm_eval.api.task import ConfigurableTask

        # it counts downloads over the network, local files too
        monkeypatch.setattr(datasets.load, "increase_load_count", lambda *a, **k: None)

        source = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml"
        config = yaml.safe_load(source.read_text())
        assert config["metadata"]["version"] == 3.0
        assert config["num_fewshot"] == gsm8k.NUM_FEWSHOT
        assert tuple(config["generation_kwargs"]["until"]) == gsm8k.STOPS
        del config["dataset_name"]
        data = resources.files("fp8kv.demo") / "data"
        files = {split: str(data / f"gsm-synth-{split}.jsonl") for split in ("train", "test")}
        config["dataset_path"] = "json"
        config["dataset_kwargs"] = {"data_files": files, "cache_dir": str(directory)}
        config["fewshot_split"] = fewshot_split
        task = ConfigurableTask(config=config)
        task.set_fewshot_seed(gsm8k.FEWSHOT_SEED)
        return task

    @pytest.mark.parametrize("fewshot_split", ["train", "test"])
    def test_every_prompt_is_byte_equal(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fewshot_split: str
    ) -> None:
        task = self.task(tmp_path, monkeypatch, fewshot_split)
        task.build_all_requests()
        shots, problems = shots_and_problems()
        same_split = fewshot_split == "test"
        ours = build_prompts(problems, problems if same_split else shots, same_split=same_split)
        assert ours == [instance.args[0] for instance in task.instances]

    def test_every_tricky_score_is_equal(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        task = self.task(tmp_path, monkeypatch, "train")
        from lm_eval.api.instance import Instance
        from lm_eval.models.utils import postprocess_generated_text

        for (generated, reference), golden in GOLDEN_SCORES.items():
            doc = {"question": "?", "answer": reference}
            instance = Instance("generate_until", doc, (), 0)
            instance.resps = [postprocess_generated_text(generated, list(gsm8k.STOPS), None)]
            task._instances = [instance]
            task.apply_filters()
            strict = instance.filtered_resps["strict-match"]
            flexible = instance.filtered_resps["flexible-extract"]
            found = [
                bool(task.process_results(doc, [strict])["exact_match"]),
                bool(task.process_results(doc, [flexible])["exact_match"]),
                *(None if text == "[invalid]" else text for text in (strict, flexible)),
            ]
            assert found == list(golden), generated
