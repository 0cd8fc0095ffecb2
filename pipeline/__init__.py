"""The core: what is computed, from documents to the sentences of a report. Nothing here imports ray,
deepspeed or mlflow; `jobs` runs it.

Rooms, from the ground up:

    errors.py     errors that become exit codes
    units.py      sizes as text
    hardware.py   what a time was taken on, and the memory that a process has held
    metrics.py    every metric, defined once: rounds, acceptance, τ, repetition
    intervals.py  how sure a figure is: bootstraps over documents, paired and over training seeds
    axes.py       the coordinate of a sweep: a cell, with its view and its place
    observe/      logs, events, progress
    store/        artifacts, their files and typed rows
    kv/           which prefix entries a drafter keeps (policies), views of a prefix, caches
    config/       every field with unit, range and meaning; files, overrides, error texts
    models/       target and drafter: loaded, built from nothing, converted, exported
    decode/       autoregressive and speculative decoding, draft sources, exact replay
    data/         documents, packed sequences, prompts; in data/sources/ a reader for each kind of source
    sweep/        the cells that are evaluated: replayed, timed, predicted
    train/        the target's labels, the losses, the training loop, checkpoints
    results/      rows pooled into cells, differences, speed, what to deploy, the report's sentences
    report/       figures, the page, the paper's numbers beside ours
    gate/         whether one drafter may replace another: bounds, verdict
    plan/         memory, arithmetic and rows of a run before it runs
    serving/      a finished drafter beside its target, for other programs

Files to read first:

    1. pipeline/kv/policies.py       which prefix entries are kept
    2. pipeline/kv/view_cache.py     a prefix read once, cut into views, and the cache that serves them
    3. pipeline/train/losses.py      the losses
    4. pipeline/train/objectives.py  the two branches, L = L_A + λ · L_C
    5. pipeline/train/loop.py        the training loop
    6. pipeline/decode/loop.py       the decoding loops
    7. pipeline/decode/replay.py     exact acceptance of every γ from one forward pass
    8. pipeline/metrics.py           every metric, defined once
    9. pipeline/results/findings.py  where the report's sentences come from
    10. jobs/stages/pipeline.py      all stages in order

The config from the command line to the loss, seven files between the command and the arithmetic:

    jobs/cli/run.py                  `budgetdraft run`: the config is read
    jobs/stages/pipeline.py          run_pipeline, run_stages: stage train after those before it
    jobs/stages/train.py             train, launch: the drafters that are missing
    jobs/executors/inline.py         train: an engine (on Ray two files: ray_executor.py, ray_train.py)
    pipeline/train/job.py            run_job, distil: model, labels, objective of one variant
    pipeline/train/loop.py           fit: the loop
    pipeline/train/objectives.py     MultiView.loss: L = L_A + λ · L_C
    pipeline/train/losses.py         LOSSES: from logits or from hidden states
    kernels/reference.py             the arithmetic (without logits: kernels/distill_loss.py)

A document to a row of the report, nine files between its reader and the row:

    pipeline/data/sources/text.py    documents: a text file, or another reader of its folder
    pipeline/data/documents.py       read_shard: documents/*.jsonl
    pipeline/data/prepare.py         write_prompts: prompts/*.jsonl
    pipeline/data/prompts.py         continuation_prompts: prompts of exact lengths
    pipeline/train/teacher.py        Teacher: the target's continuation of each prompt (by decode/loop.py)
    pipeline/sweep/evaluator.py      replay: all cells of a slice of prompts
    pipeline/sweep/replayer.py       PromptReplay.rows: every view, control and γ of a prompt
    pipeline/decode/replay.py        the arithmetic: which proposals are accepted, in which rounds
    pipeline/metrics.py              Counts.of: the rounds added up
    pipeline/sweep/make_rows.py      make_row: rows/*.jsonl
    pipeline/results/pool.py         cell_rows: cells.jsonl, the rows of the report
"""
