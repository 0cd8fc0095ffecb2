"""The core: what is computed, from documents to the sentences of a report. Nothing here imports ray,
deepspeed or mlflow; `jobs` runs it.

Rooms, from the ground up:

    errors.py     errors that become exit codes
    units.py      sizes as text
    markdown.py   tables in Markdown
    hardware.py   what a time was taken on, and memory: of the machine, of a process
    metrics.py    every metric, defined once: rounds, acceptance, τ, repetition
    intervals.py  how sure a figure is: bootstraps over documents, paired and over training seeds
    axes.py       the coordinate of a sweep: a cell, with its view and its place
    observe/      logs, events, progress
    store/        artifacts, their files and typed rows
    kv/           which prefix entries a drafter keeps (policies), views of a prefix, caches
    config/       every field with unit, range and meaning; files, overrides, error texts
    models/       target and drafter: which can be run; loaded, built from nothing, converted, exported; in
                  models/heads/ heads over a target's hidden states
    decode/       autoregressive and speculative decoding, draft sources, exact replay
    data/         documents, packed sequences, prompts; in data/sources/ a reader for each kind of source
    sweep/        the cells that are evaluated: counted, replayed, timed, predicted
    train/        the losses, the training loop, checkpoints; in train/target/ what the target says of texts
    results/      rows pooled into cells, differences, speed, what to deploy, the report's sentences
    report/       figures, the page, the paper's numbers beside ours
    gate/         whether one drafter may replace another: bounds, verdict
    plan/         memory and hours of a run before it runs
    serving/      a finished drafter beside its target, for other programs and for engines

Files to read first:

    1. pipeline/kv/policies.py       which prefix entries are kept
    2. pipeline/kv/view_cache.py     a prefix read once, cut into views, and the cache that serves them
    3. pipeline/train/losses.py      the losses
    4. pipeline/train/objectives.py  the two branches, L = L_A + λ · L_C
    5. pipeline/train/loop.py        the training loop
    6. pipeline/decode/loop.py       the decoding loops
    7. pipeline/decode/replay.py     exact acceptance of every γ from one forward pass
    8. pipeline/metrics.py           every metric, defined once
    9. pipeline/results/findings.py  where the report's sentences come from; its first screen: brief.py
    10. jobs/stages/pipeline.py      all stages in order

The config from `jobs/cli/run.py` to the loss, four files between the command and the arithmetic:

    jobs/stages/pipeline.py          run_stages: stage train, after those before it
    jobs/stages/train.py             launch: the drafters that are missing, by an executor that calls run_job
    pipeline/train/job.py            distil: model, labels and objective of one variant; `fit` is its loop
    pipeline/train/objectives.py     MultiView.loss: L = w·L_A + λ·L_C over windows and views
    → pipeline/train/losses.py       a loss a function; the sums are in kernels/reference.py

A document of `pipeline/data/sources/` to a row of the report, four files beside the arithmetic:

    pipeline/data/prepare.py         write_prompts: a reader's documents → prompts of exact lengths
    pipeline/sweep/evaluator.py      replay: every drafter on a slice of the prompts
    pipeline/sweep/replayer.py       PromptReplay.rows: every view, control and γ of a prompt → rows/*.jsonl
    → pipeline/decode/replay.py      which proposals are accepted, and the rounds that follow
    pipeline/results/pool.py         cell_rows: a cell over its prompts → cells.jsonl, the report's rows
"""
