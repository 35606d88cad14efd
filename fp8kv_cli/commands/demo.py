"""``fp8kv demo``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fp8kv.options import output_options
from fp8kv.output import Output

if TYPE_CHECKING:
    from fp8kv.runtime.evaluation.eval_report import EvalReport

_SOURCE = "builtin:gsm-synth"
_NUM_SAMPLES = 128
_SEQ_LEN = 512


@click.command("demo", short_help="See the whole job on two small embedded models.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Directory to make.  [default: fp8kv-demo, or the next free name]",
)
@click.option(
    "--limit",
    type=click.IntRange(min=1, max=500),
    default=16,
    show_default=True,
    help="Problems per model and arm.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, ...")
@output_options
def demo_command(out: Path | None, limit: int, device: str, as_json: bool, quiet: bool) -> None:
    """Show the whole job on two small trained models: calibrate, write, validate, evaluate.

    Needs no network, no GPU and two to three minutes. The models answer templated word problems in GSM8K's
    format; one has the MiniMax-M2 architecture (GQA), one the DeepSeek-V3 architecture (MLA).
    """
    from fp8kv.demo import MODELS

    output = Output(as_json=as_json, quiet=quiet)
    start = time.perf_counter()
    root = out or _free_name(Path("fp8kv-demo"))
    results = {}
    for name, source in MODELS.items():
        output.say(f"\n== {name} ==")
        results[name] = _run_one(source, root / name, limit, device, output)
    seconds = time.perf_counter() - start
    output.say(f"\ndone in {seconds:.0f} s. The converted checkpoints:")
    for name in MODELS:
        output.data(str(root / name))
    output.say(
        "\nwhat to run next:\n"
        f"  fp8kv inspect {root / 'tiny-minimax-m2'}          the scales in it\n"
        f"  fp8kv scales --from {root / 'tiny-deepseek-v3' / 'fp8kv' / 'kv-stats.safetensors'} "
        "--estimator mse\n"
        "                                              other scales from the same statistics\n"
        f"  fp8kv serve {root / 'tiny-minimax-m2'}            OpenAI's API over its FP8 cache\n"
        "  fp8kv calibrate YOUR_MODEL --out DIR --dry-run   the plan for a model of yours"
    )
    output.json({"seconds": round(seconds, 1), "models": results})


def _run_one(source: Path, out: Path, limit: int, device: str, output: Output) -> dict[str, Any]:
    from fp8kv.calibrate.pipeline import calibrate
    from fp8kv.calibrate.stats_file import read_absmax
    from fp8kv.calibrate.validation.validate import validate
    from fp8kv.commands.calibrate import show_result
    from fp8kv.demo import BUILTIN_DATASETS
    from fp8kv.recipes import default_recipe, override

    recipe = override(
        default_recipe(),
        {
            "name": "demo",
            "data.sources": [{"dataset": _SOURCE}],
            "data.num_samples": _NUM_SAMPLES,
            "data.seq_len": _SEQ_LEN,
        },
    )
    talk = Output(as_json=False, quiet=output.quiet or output.as_json)
    with talk.progress() as bars:
        result = calibrate(
            str(source),
            out,
            recipe=recipe,
            device=device,
            builtin_datasets=BUILTIN_DATASETS,
            listener=bars,
        )
    show_result(result, recipe, talk, print_path=False)
    checks = validate(out, read_absmax)
    findings = [check for check in checks if not check.passed]
    for check in findings:
        output.say(f"FAIL {check.name}: {check.detail}")
    output.say(f"validated: {len(checks)} checks, {len(findings)} findings")
    report = _evaluate(out, limit, device, talk)
    from fp8kv.runtime.evaluation.eval_markdown import to_markdown

    output.say("\n" + to_markdown(report))
    return {
        "out": str(out),
        "checks": len(checks),
        "findings": len(findings),
        "eval": report.to_json(),
    }


def _evaluate(directory: Path, limit: int, device: str, output: Output) -> EvalReport:
    from fp8kv.commands.eval_settings import read_questions
    from fp8kv.demo import TEST_DATA, TRAIN_DATA
    from fp8kv.runtime.evaluation.evaluate import EvaluationSettings, evaluate
    from fp8kv.runtime.evaluation.gsm8k_eval import Gsm8kSettings

    questions = read_questions(str(TEST_DATA), str(TRAIN_DATA))
    settings = EvaluationSettings(gsm8k=Gsm8kSettings(questions, limit=limit))
    with output.progress() as bars:
        return evaluate(str(directory), settings, device=device, progress=bars.add)


def _free_name(path: Path) -> Path:
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate
