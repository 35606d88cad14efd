"""Drawing samples: shares, order, duplicates, shortages, and each kind of file to its samples."""

import importlib.resources
import json
import sys
import types

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fp8kv.calibrate.data.loading import (
    HELD_OUT_FOLD,
    NUM_FOLDS,
    Source,
    load_samples,
    make_batches,
    share_by_weight,
)
from fp8kv.recipes.errors import DataError

BOS = 0


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer with one token per byte, and BOS by itself before a text and in its template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(
        models.BPE(vocab={"<s>": BOS} | {c: 1 + i for i, c in enumerate(alphabet)}, merges=[])
    )
    backend.decoder = decoders.ByteLevel()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    fast.chat_template = (
        "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return fast


@pytest.fixture
def load(tokenizer):
    def call(*sources, num_samples=4, seq_len=64, seed=0, **options):
        described = [Source(str(s)) if not isinstance(s, Source) else s for s in sources]
        return load_samples(
            described, tokenizer, num_samples=num_samples, seq_len=seq_len, seed=seed, **options
        )

    return call


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(path, count, prefix="row"):
    return jsonl(path, [{"text": f"{prefix} {i}"} for i in range(count)])


def decoded(tokenizer, loaded):
    return [tokenizer.decode(sample.token_ids.tolist()) for sample in loaded.samples]


def test_samples_are_drawn_from_the_whole_file_in_a_seeded_order(tmp_path, load, tokenizer):
    path = texts(tmp_path / "a.jsonl", 100)
    first = decoded(tokenizer, load(path, num_samples=10))
    assert len(set(first)) == 10
    assert set(first) <= {f"<s>row {i}" for i in range(100)}
    assert first != [f"<s>row {i}" for i in range(10)]
    assert decoded(tokenizer, load(path, num_samples=10)) == first
    assert decoded(tokenizer, load(path, num_samples=10, seed=1)) != first
    assert decoded(tokenizer, load(path, num_samples=20))[:10] == first


def test_the_digest_and_folds_do_not_depend_on_the_order_of_rows(tmp_path, load):
    rows = [{"text": f"row {i}"} for i in range(40)]
    one = load(jsonl(tmp_path / "a.jsonl", rows), num_samples=40)
    other = load(jsonl(tmp_path / "b.jsonl", rows[::-1]), num_samples=40, seed=3)
    assert one.digest == other.digest
    assert {s.digest: s.fold for s in one.samples} == {s.digest: s.fold for s in other.samples}
    assert one.digest != load(tmp_path / "a.jsonl", num_samples=39).digest
    assert {s.fold for s in one.samples} <= set(range(NUM_FOLDS))


def test_a_few_samples_still_hold_one_out(tmp_path, load):
    for count in range(2, 9):
        loaded = load(texts(tmp_path / "a.jsonl", count), num_samples=count)
        held_out = [sample.fold == HELD_OUT_FOLD for sample in loaded.samples]
        assert any(held_out)
        assert not all(held_out)


def test_question_and_answer_read_as_the_harness_forms_them(tmp_path, load, tokenizer):
    path = jsonl(tmp_path / "a.jsonl", [{"question": "1+1?", "answer": "It is 2.\n#### 2"}])
    assert decoded(tokenizer, load(path, num_samples=1)) == [
        "<s>Question: 1+1?\nAnswer: It is 2.\n#### 2"
    ]


def test_messages_are_rendered_with_one_bos_and_no_generation_prompt(tmp_path, load, tokenizer):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path = jsonl(tmp_path / "a.jsonl", [{"messages": messages}])
    assert decoded(tokenizer, load(path, num_samples=1)) == ["<s>[user]hi[assistant]ho"]
    never = load(path, num_samples=1, chat_template="never")
    assert decoded(tokenizer, never) == ["<s>hi\n\nho"]


def test_long_rows_are_cut_and_counted(tmp_path, load, tokenizer):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "x" * 7}, {"text": "y" * 8}, {"text": "z" * 90}])
    loaded = load(path, num_samples=3, seq_len=8)
    assert sorted(sample.num_tokens for sample in loaded.samples) == [8, 8, 8]
    assert loaded.sources[0].truncated == 2
    assert loaded.num_tokens == loaded.sources[0].tokens == 24


def test_empty_rows_and_duplicates_are_left_out_and_counted(tmp_path, load):
    rows = [{"text": t} for t in ("same", "same", "", None, " ", "other", "same")]
    loaded = load(jsonl(tmp_path / "a.jsonl", rows), num_samples=2)
    assert len(loaded.samples) == 2
    rows += [{"text": "third"}]
    with pytest.raises(DataError, match="has 3 samples where 4 are asked of it") as error:
        load(jsonl(tmp_path / "a.jsonl", rows), num_samples=4)
    assert "3 empty and 2 duplicate rows left out" in str(error.value)


def test_rows_that_differ_only_past_the_cut_are_duplicates(tmp_path, load):
    rows = [{"text": "abcdefgh one"}, {"text": "abcdefgh two"}]
    with pytest.raises(DataError, match="1 duplicate rows"):
        load(jsonl(tmp_path / "a.jsonl", rows), num_samples=2, seq_len=8)


def test_a_duplicate_in_another_source_counts_there(tmp_path, load):
    first = jsonl(tmp_path / "a.jsonl", [{"text": "same"}])
    second = jsonl(tmp_path / "b.jsonl", [{"text": "same"}, {"text": "own"}])
    loaded = load(first, second, num_samples=2)
    assert [summary.taken for summary in loaded.sources] == [1, 1]
    assert len({sample.digest for sample in loaded.samples}) == 2


def test_weights_decide_the_shares(tmp_path, load):
    heavy = Source(str(texts(tmp_path / "a.jsonl", 50, "a")), weight=3)
    light = Source(str(texts(tmp_path / "b.jsonl", 50, "b")))
    loaded = load(heavy, light, num_samples=20)
    assert [summary.taken for summary in loaded.sources] == [15, 5]
    assert [summary.source for summary in loaded.sources] == [heavy, light]


@given(
    st.lists(st.floats(min_value=1e-6, max_value=1e6), min_size=1, max_size=8),
    st.integers(0, 5000),
)
def test_shares_add_up_and_are_rounded_quotas(weights, total):
    shares = share_by_weight(weights, total)
    assert sum(shares) == total
    for weight, share in zip(weights, shares, strict=True):
        assert abs(share - total * weight / sum(weights)) < 1 + 1e-6


def test_equal_remainders_go_to_the_earlier_source():
    assert share_by_weight([1, 1, 1], 4) == [2, 1, 1]
    assert share_by_weight([1, 1, 1], 5) == [2, 2, 1]


def test_a_source_whose_share_is_nothing_is_refused(tmp_path, load):
    heavy = Source(str(texts(tmp_path / "a.jsonl", 9)), weight=100)
    light = Source(str(texts(tmp_path / "b.jsonl", 9)), weight=0.5)
    with pytest.raises(DataError, match=r"b\.jsonl with weight 0\.5 gets none of 4 samples"):
        load(heavy, light)


def test_too_few_samples_say_found_and_asked_and_what_to_lower(tmp_path, load):
    few = texts(tmp_path / "few.jsonl", 3)
    with pytest.raises(DataError) as error:
        load(few, num_samples=10)
    assert f"dataset {few} has 3 samples where 10 are asked of it" in str(error.value)
    assert "lower --num-samples to 3" in str(error.value)
    with pytest.raises(DataError, match="lower --num-samples or this dataset's weight"):
        load(texts(tmp_path / "many.jsonl", 99, "b"), few, num_samples=10)


def test_an_empty_dataset_and_one_of_empty_rows_are_told_apart(tmp_path, load):
    empty = tmp_path / "a.jsonl"
    empty.write_text("\n")
    with pytest.raises(DataError, match=r"a\.jsonl is empty"):
        load(empty)
    with pytest.raises(DataError, match=r"has no sample to give: 1 empty .*check its columns"):
        load(jsonl(empty, [{"text": ""}]))


def test_a_text_file_is_cut_into_pieces_that_cover_it(tmp_path, load, tokenizer):
    path = tmp_path / "a.txt"
    text = "".join(f"line {i}\n" for i in range(40))
    path.write_text(text)
    count = -(-len(text) // 15)
    loaded = load(path, num_samples=count, seq_len=16)
    pieces = [piece.removeprefix("<s>") for piece in decoded(tokenizer, loaded)]
    assert sorted(pieces) == sorted(text[i : i + 15] for i in range(0, len(text), 15))
    assert pieces != [text[i : i + 15] for i in range(0, len(text), 15)]
    assert loaded.sources[0].truncated == 0
    with pytest.raises(DataError, match=f"has {count} samples where {count + 1} are asked"):
        load(path, num_samples=count + 1, seq_len=16)
    with pytest.raises(DataError, match="no columns; leave out column="):
        load(Source(str(path), column="text"))
    path.write_text("")
    with pytest.raises(DataError, match=r"a\.txt is empty"):
        load(path)


def test_all_kinds_of_file_give_the_same_samples(tmp_path, load):
    rows = [{"question": f"{i}+{i}?", "answer": f"#### {2 * i}"} for i in range(12)]
    jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps({"data": rows}))
    lines = ["question,answer", *(f"{row['question']},{row['answer']}" for row in rows)]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    digests = {
        suffix: load(tmp_path / f"a{suffix}", num_samples=12).digest
        for suffix in (".jsonl", ".json", ".csv", ".parquet")
    }
    assert len(set(digests.values())) == 1, digests


def test_local_files_need_no_datasets_package(tmp_path, load, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(load(texts(tmp_path / "a.jsonl", 4)).samples) == 4


def test_a_hub_dataset_that_ends_early_is_a_shortage_too(load, monkeypatch):
    class Stream(list):
        def shuffle(self, **_):
            return self

    package = types.SimpleNamespace(
        load_dataset=lambda **_: Stream({"text": f"row {i}"} for i in range(6))
    )
    monkeypatch.setitem(sys.modules, "datasets", package)
    assert load("someone/set", num_samples=6).sources[0].taken == 6
    with pytest.raises(DataError, match="someone/set has 6 samples where 7 are asked"):
        load("someone/set", num_samples=7)


def test_a_misspelt_last_source_fails_before_the_first_is_read(tmp_path, load):
    broken = tmp_path / "a.jsonl"
    broken.write_text("{")
    with pytest.raises(DataError, match=r"b\.jsonl does not exist"):
        load(broken, tmp_path / "b.jsonl")


def test_progress_counts_samples_over_all_sources(tmp_path, load):
    calls = []
    load(
        texts(tmp_path / "a.jsonl", 9, "a"),
        texts(tmp_path / "b.jsonl", 9, "b"),
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "--num-samples is 0; it must be at least 1"),
        ({"seq_len": 1}, "--seq-len is 1; it must be at least 2"),
        ({"chat_template": "often"}, "must be one of auto, always, never"),
    ],
)
def test_numbers_out_of_range_name_their_option(load, options, message):
    with pytest.raises(DataError) as error:
        load("a.jsonl", **options)
    assert message in str(error.value)


def test_no_source_at_all_names_the_option(load):
    with pytest.raises(DataError, match="name one with --dataset"):
        load()


def test_the_packaged_problems_are_ready_to_draw_and_to_batch(load):
    folder = importlib.resources.files("fp8kv.demo") / "data"
    questions = {}
    for name, count in (("train", 2000), ("test", 500)):
        with importlib.resources.as_file(folder / f"gsm-synth-{name}.jsonl") as path:
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            assert {tuple(row) for row in rows} == {("question", "answer")}
            assert len(rows) == count
            questions[name] = {row["question"] for row in rows}
            loaded = load(path, num_samples=32, seq_len=2048)
        batches = make_batches(loaded.samples, pad_token_id=0, max_tokens=4096)
        assert sum(batch.num_tokens for batch in batches) == loaded.num_tokens
    assert not questions["train"] & questions["test"]
