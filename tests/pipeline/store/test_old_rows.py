"""Lines of format 2, as they were written, and what they are today."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.axes import NOTHING, Cell, View
from pipeline.errors import BadData
from pipeline.gate.verdict import GatedCell
from pipeline.intervals import Interval
from pipeline.metrics import Counts
from pipeline.results.recommend import Choice, Recommendation
from pipeline.results.summary import ArSpeed, ControlGap, Estimate, FamilyGain, Gain
from pipeline.store.files import read_rows, write_rows
from pipeline.store.old_rows import as_today
from pipeline.store.rows import (
    CellRow,
    FailedCell,
    OfCell,
    PickedCell,
    PredictedRow,
    PromptRow,
    Row,
    Speed,
    Timing,
)

CELL = Cell("multi_view~42", "pg19", "4K", View("chunk_topk", 256), gamma=4, seed=42)

PICKED = (
    '{"drafter":"multi_view~42","dataset":"pg19","context":"4K","policy":"chunk_topk","budget":256,'
    '"control":null,"gamma":4,"threshold":0.0,"temperature":0.0,"seed":42}'
)
REPLAYED = (
    '{"drafter":"multi_view~42","dataset":"pg19","context":"4K","policy":"chunk_topk","budget":256,'
    '"control":"other_prompt","gamma":4,"threshold":0.4,"temperature":0.0,"seed":42,"mode":"replay",'
    '"prompt_id":"p1","document_id":"d1","prompts_together":1,"together_with":null,"num_tokens":63,'
    '"num_left_out":0,"num_rounds":20,"num_proposed":null,"num_accepted":43,"reached":[20,14,9,5],'
    '"kept":[14,9,6,4],"repetition_rate":0.25,"looping":true,"in_trained_range":false,'
    '"drafter_kv_bytes":4096,"target_kv_bytes":null,"exact":null,"divergence_gap":null,"logit_noise":null,'
    '"prefill_s":null,"ar_prefill_s":null,"decode_s":[],"ar_decode_s":[],"compile_s":null,'
    '"ar_num_tokens":null,"peak_memory_bytes":null,"hardware":null,"text":null}'
)
ESTIMATED = (
    '{"drafter":"multi_view~42","dataset":"pg19","context":"4K","policy":"chunk_topk","budget":256,'
    '"control":null,"gamma":4,"threshold":0.0,"temperature":1.0,"seed":3,"mode":"estimate",'
    '"prompt_id":"p1","document_id":"d1","prompts_together":1,"together_with":null,"num_tokens":63,'
    '"num_left_out":0,"num_rounds":20.5,"num_proposed":77.25,"num_accepted":42.5,'
    '"reached":[20.5,14.0,9.0,5.0],"kept":[14.0,9.0,5.5,4.0],"repetition_rate":0.25,"looping":false,'
    '"in_trained_range":true,"drafter_kv_bytes":4096,"target_kv_bytes":null,"exact":null,'
    '"divergence_gap":null,"logit_noise":null,"prefill_s":null,"ar_prefill_s":null,"decode_s":[],'
    '"ar_decode_s":[],"compile_s":null,"ar_num_tokens":null,"peak_memory_bytes":null,"hardware":null,'
    '"text":null}'
)
MEASURED = (
    '{"drafter":"multi_view~42","dataset":"pg19","context":"4K","policy":"chunk_topk","budget":256,'
    '"control":null,"gamma":4,"threshold":0.0,"temperature":0.0,"seed":42,"mode":"measure",'
    '"prompt_id":"p1","document_id":"d1","prompts_together":2,"together_with":"p0","num_tokens":63,'
    '"num_left_out":7,"num_rounds":20,"num_proposed":78,"num_accepted":43,"reached":[20,14,9,5],'
    '"kept":[14,9,6,4],"repetition_rate":0.25,"looping":false,"in_trained_range":true,'
    '"drafter_kv_bytes":4096,"target_kv_bytes":65536,"exact":false,"divergence_gap":0.001,'
    '"logit_noise":0.002,"prefill_s":1.5,"ar_prefill_s":1.0,"decode_s":[2.0,2.5],"ar_decode_s":[3.0,3.5],'
    '"compile_s":0.75,"ar_num_tokens":70,"peak_memory_bytes":1000000,"hardware":"cpu: made, 2 threads",'
    '"text":"once upon"}'
)
# Of a sampled text that was decoded alone, on a device whose memory nobody asked for.
PLAINLY_MEASURED = (
    '{"drafter":"self_speculation","dataset":"pg19","context":"4K","policy":"snapkv","budget":256,'
    '"control":null,"gamma":4,"threshold":0.0,"temperature":1.0,"seed":3,"mode":"measure",'
    '"prompt_id":"p1","document_id":"d1","prompts_together":1,"together_with":"p1","num_tokens":63,'
    '"num_left_out":0,"num_rounds":20,"num_proposed":78,"num_accepted":43,"reached":[20,14,9,5],'
    '"kept":[14,9,6,4],"repetition_rate":0.25,"looping":false,"in_trained_range":true,'
    '"drafter_kv_bytes":4096,"target_kv_bytes":65536,"exact":null,"divergence_gap":null,'
    '"logit_noise":null,"prefill_s":null,"ar_prefill_s":null,"decode_s":[2.0],"ar_decode_s":[3.0],'
    '"compile_s":null,"ar_num_tokens":70,"peak_memory_bytes":null,"hardware":null,"text":null}'
)
REPLAYED_CELL = (
    '{"drafter":"multi_view~42","dataset":"pg19","context":"4K","policy":"chunk_topk","budget":256,'
    '"control":null,"gamma":4,"threshold":0.4,"temperature":0.0,"seed":42,"mode":"replay","num_prompts":9,'
    '"num_documents":8,"num_looping":1,"num_left_out":0,"num_clocked":null,"prompts_together":1,'
    '"acceptance":null,"acceptance_low":null,"acceptance_high":null,"acceptance_not_looping":null,'
    '"mean_tokens_per_round":3.15,"conditional_acceptance":[0.7,0.6],"in_trained_range":true,'
    '"drafter_kv_bytes":4096,"target_kv_bytes":null,"exact_prompts":null,"speedup":null,'
    '"speedup_low":null,"speedup_high":null,"worst_prompt_speedup":null,"end_to_end_speedup":null,'
    '"end_to_end_low":null,"end_to_end_high":null,"tokens_per_s":null,"ar_tokens_per_s":null,'
    '"peak_memory_bytes":null}'
)
MEASURED_CELL = (
    '{"drafter":"multi_view~42","dataset":"pg19","context":"4K","policy":"chunk_topk","budget":256,'
    '"control":null,"gamma":4,"threshold":0.0,"temperature":0.0,"seed":42,"mode":"measure","num_prompts":9,'
    '"num_documents":8,"num_looping":1,"num_left_out":7,"num_clocked":6,"prompts_together":2,'
    '"acceptance":0.5,"acceptance_low":0.4,"acceptance_high":0.6,"acceptance_not_looping":0.45,'
    '"mean_tokens_per_round":3.15,"conditional_acceptance":[0.7,0.6],"in_trained_range":true,'
    '"drafter_kv_bytes":4096,"target_kv_bytes":65536,"exact_prompts":8,"speedup":1.5,"speedup_low":1.25,'
    '"speedup_high":1.75,"worst_prompt_speedup":1.125,"end_to_end_speedup":1.2,"end_to_end_low":1.1,'
    '"end_to_end_high":1.3,"tokens_per_s":30.0,"ar_tokens_per_s":20.0,"peak_memory_bytes":1000000}'
)
WITHOUT_PREFILLS = (
    MEASURED_CELL.replace('"end_to_end_speedup":1.2', '"end_to_end_speedup":null')
    .replace('"end_to_end_low":1.1', '"end_to_end_low":null')
    .replace('"end_to_end_high":1.3', '"end_to_end_high":null')
)
PREDICTED = (
    '{"drafter":"multi_view~42","dataset":"pg19","context":"4K","policy":"chunk_topk","budget":256,'
    '"control":null,"gamma":4,"threshold":0.0,"temperature":0.0,"seed":42,"num_prompts":9,'
    '"num_documents":8,"decode_s":2.25,"speedup":1.5,"speedup_low":1.25,"speedup_high":1.75}'
)
FAILED = (
    '{"drafter":"multi_view~42","dataset":"pg19","context":"4K","policy":"all","budget":"full",'
    '"control":null,"gamma":0,"threshold":0.0,"temperature":0.0,"seed":42,"mode":"replay",'
    '"prompt_id":"p1","error":"NotFinite: logits not finite in replay"}'
)
ESTIMATE = (
    '{"drafter":"multi_view~42","dataset":"pg19","context":"4K","policy":"chunk_topk","budget":256,'
    '"control":null,"gamma":4,"threshold":0.0,"temperature":0.0,"seed":42,"mean":0.02,"low":-0.01,'
    '"high":0.05,"num_prompts":9,"num_documents":8}'
)
GAIN = (
    '{"drafter":"multi_view~42","dataset":"pg19","context":"4K","policy":"chunk_topk","budget":256,'
    '"control":"other_prompt","gamma":4,"threshold":0.0,"temperature":0.0,"seed":42,"mean":0.02,'
    '"low":-0.01,"high":0.05,"num_prompts":9,"num_documents":8,"baseline":"full_only~42","prompts":"all",'
    '"lost":[0.01,-0.02,0.04]}'
)
FAMILY_GAIN = (
    '{"drafter":"multi_view","dataset":"pg19","context":"4K","policy":"chunk_topk","budget":256,'
    '"control":null,"gamma":4,"threshold":0.0,"temperature":0.0,"seed":42,"mean":0.02,"low":-0.01,'
    '"high":0.05,"num_prompts":9,"num_documents":8,"baseline":"full_only","prompts":"not_looping",'
    '"lost":null,"num_seeds":2,"by_seed":[0.01,0.03]}'
)
CONTROL_GAP = (
    '{"drafter":"multi_view~42","dataset":"pg19","context":"4K","policy":"chunk_topk","budget":0,'
    '"control":"no_prefix","gamma":4,"threshold":0.0,"temperature":0.0,"seed":42,"mean":0.02,"low":-0.01,'
    '"high":0.05,"num_prompts":9,"num_documents":8,"real_budget":64}'
)
RECOMMENDATION = (
    '{"dataset":"pg19","context":"4K","choice":{"drafter":"multi_view~42","dataset":"pg19","context":"4K",'
    '"policy":"chunk_topk","budget":256,"control":null,"gamma":4,"threshold":0.0,"temperature":0.0,'
    '"seed":42,"speedup":1.5,"speedup_low":1.25,"speedup_high":1.75,"prompts_together":1,"run_off":1.4,'
    '"again":1.3,"again_low":1.2,"again_high":1.45,"end_to_end":1.2,"num_documents":6,"num_inexact":0,'
    '"acceptance":0.5,"acceptance_mode":"replay","drafter_kv_bytes":4096},'
    '"runner_up":{"drafter":"prompt_lookup","dataset":"pg19","context":"4K","policy":"none","budget":0,'
    '"control":null,"gamma":4,"threshold":0.0,"temperature":0.0,"seed":42,"speedup":1.1,"speedup_low":0.9,'
    '"speedup_high":1.2,"prompts_together":1,"run_off":null,"again":null,"again_low":null,'
    '"again_high":null,"end_to_end":null,"num_documents":6,"num_inexact":0,"acceptance":null,'
    '"acceptance_mode":null,"drafter_kv_bytes":0},'
    '"why":"the fastest of 2 measured cells","num_again":1,"best_again":1.3}'
)
AR_SPEED = (
    '{"dataset":"pg19","context":"4K","temperature":0.0,"mean":139.5,"low":136.25,"high":141.75,'
    '"num_prompts":9,"num_documents":8}'
)
GATED = (
    '{"name":"pg19, context 4K, chunk_topk, B = 256, γ = 4","dataset":"pg19","context":"4K",'
    '"policy":"chunk_topk","budget":256,"gamma":4,"temperature":0.0,"seed":0,"metric":"acceptance",'
    '"candidate":0.55,"baseline":0.5,"difference":0.05,"floor":-0.01,"low":0.03,"high":0.08,'
    '"num_prompts":9,"num_documents":8,"num_looping":1,"outcome":"pass","documents_needed":null,'
    '"documents_if_equal":null,"not_looping":[0.04,0.02,0.06],"other_prompt":null}'
)

COUNTS = Counts(63, 20, 78, 43, (20, 14, 9, 5), (14, 9, 6, 4))
TIMED = Timing(
    decode_s=[2.0, 2.5], ar_decode_s=[3.0, 3.5], ar_num_tokens=70, prefill_s=1.5, ar_prefill_s=1.0,
    compile_s=0.75, prompts_together=2, together_with="p0", target_kv_bytes=65536,
    peak_memory_bytes=1_000_000, exact=False, divergence_gap=0.001, logit_noise=0.002,
    hardware="cpu: made, 2 threads", text="once upon",
)  # fmt: skip
SPEED = Speed(
    speedup=Interval(1.5, 1.25, 1.75), worst_prompt_speedup=1.125, end_to_end=Interval(1.2, 1.1, 1.3),
    tokens_per_s=30.0, ar_tokens_per_s=20.0, num_clocked=6,
)  # fmt: skip
MEASURED_CELL_TODAY = CellRow(
    cell=CELL, mode="measure", num_prompts=9, num_documents=8, num_looping=1, num_left_out=7,
    prompts_together=2, acceptance=Interval(0.5, 0.4, 0.6), acceptance_not_looping=0.45,
    mean_tokens_per_round=3.15, conditional_acceptance=[0.7, 0.6], in_trained_range=True,
    drafter_kv_bytes=4096, target_kv_bytes=65536, exact_prompts=8, peak_memory_bytes=1_000_000, speed=SPEED,
)  # fmt: skip
VALUE = Interval(0.02, -0.01, 0.05)

READ: dict[str, tuple[str, Row]] = {
    "a picked cell": (PICKED, PickedCell(cell=CELL)),
    "a replayed prompt": (
        REPLAYED,
        PromptRow(
            cell=CELL.vary(control="other_prompt", threshold=0.4), mode="replay", prompt_id="p1",
            document_id="d1", counts=Counts(63, 20, None, 43, (20, 14, 9, 5), (14, 9, 6, 4)),
            num_left_out=0, repetition_rate=0.25, looping=True, in_trained_range=False,
            drafter_kv_bytes=4096, timing=None,
        ),
    ),
    "an estimated prompt": (
        ESTIMATED,
        PromptRow(
            cell=CELL.vary(temperature=1.0, seed=3), mode="estimate", prompt_id="p1", document_id="d1",
            counts=Counts(63, 20.5, 77.25, 42.5, (20.5, 14.0, 9.0, 5.0), (14.0, 9.0, 5.5, 4.0)),
            num_left_out=0, repetition_rate=0.25, looping=False, in_trained_range=True,
            drafter_kv_bytes=4096, timing=None,
        ),
    ),
    "a measured prompt": (
        MEASURED,
        PromptRow(
            cell=CELL, mode="measure", prompt_id="p1", document_id="d1", counts=COUNTS, num_left_out=7,
            repetition_rate=0.25, looping=False, in_trained_range=True, drafter_kv_bytes=4096, timing=TIMED,
        ),
    ),
    "a measured prompt of which little was taken": (
        PLAINLY_MEASURED,
        PromptRow(
            cell=Cell(
                "self_speculation", "pg19", "4K", View("snapkv", 256), 4, temperature=1.0, seed=3,
                kind="self_speculation",
            ),
            mode="measure", prompt_id="p1", document_id="d1", counts=COUNTS, repetition_rate=0.25,
            looping=False, in_trained_range=True, drafter_kv_bytes=4096,
            timing=Timing(
                decode_s=[2.0], ar_decode_s=[3.0], ar_num_tokens=70, compile_s=0.0, prompts_together=1,
                together_with="p1", target_kv_bytes=65536,
            ),
        ),
    ),
    "a replayed cell whose proposals are unknown": (
        REPLAYED_CELL,
        CellRow(
            cell=CELL.vary(threshold=0.4), mode="replay", num_prompts=9, num_documents=8, num_looping=1,
            num_left_out=0, prompts_together=1, acceptance=None, acceptance_not_looping=None,
            mean_tokens_per_round=3.15, conditional_acceptance=[0.7, 0.6], in_trained_range=True,
            drafter_kv_bytes=4096, target_kv_bytes=None, exact_prompts=None, peak_memory_bytes=None,
            speed=None,
        ),
    ),
    "a measured cell": (MEASURED_CELL, MEASURED_CELL_TODAY),
    "a measured cell without prefills": (
        WITHOUT_PREFILLS,
        MEASURED_CELL_TODAY.model_copy(update={"speed": SPEED.model_copy(update={"end_to_end": None})}),
    ),
    "a predicted cell": (
        PREDICTED,
        PredictedRow(
            cell=CELL, num_prompts=9, num_documents=8, decode_s=2.25, speedup=Interval(1.5, 1.25, 1.75)
        ),
    ),
    "all cells of a prompt, failed": (
        FAILED,
        FailedCell(
            cell=CELL.vary(policy="all", budget="full", gamma=0), mode="replay", prompt_id="p1",
            error="NotFinite: logits not finite in replay",
        ),
    ),
    "an estimate": (ESTIMATE, Estimate(cell=CELL, value=VALUE, num_prompts=9, num_documents=8)),
    "a gain": (
        GAIN,
        Gain(
            cell=CELL.vary(control="other_prompt"), value=VALUE, num_prompts=9, num_documents=8,
            baseline="full_only~42", prompts="all", lost=Interval(0.01, -0.02, 0.04),
        ),
    ),
    "a gain over training seeds": (
        FAMILY_GAIN,
        FamilyGain(
            cell=CELL.vary(drafter="multi_view"), value=VALUE, num_prompts=9, num_documents=8,
            baseline="full_only", prompts="not_looping", lost=None, num_seeds=2, by_seed=[0.01, 0.03],
        ),
    ),
    "a gap to a control": (
        CONTROL_GAP,
        ControlGap(
            cell=CELL.vary(budget=0, control="no_prefix"), value=VALUE, num_prompts=9, num_documents=8,
            real_budget=64,
        ),
    ),
    "a recommendation": (
        RECOMMENDATION,
        Recommendation(
            dataset="pg19", context="4K",
            choice=Choice(
                cell=CELL, speedup=Interval(1.5, 1.25, 1.75), prompts_together=1, run_off=1.4,
                again=Interval(1.3, 1.2, 1.45), end_to_end=1.2, num_documents=6, num_inexact=0,
                acceptance=0.5, acceptance_mode="replay", drafter_kv_bytes=4096,
            ),
            runner_up=Choice(
                cell=Cell("prompt_lookup", "pg19", "4K", NOTHING, 4, seed=42, kind="prompt_lookup"),
                speedup=Interval(1.1, 0.9, 1.2), prompts_together=1, run_off=None, again=None,
                end_to_end=None, num_documents=6, num_inexact=0, acceptance=None, acceptance_mode=None,
                drafter_kv_bytes=0,
            ),
            why="the fastest of 2 measured cells", num_again=1, best_again=1.3,
        ),
    ),
    "speed of autoregressive decoding": (
        AR_SPEED,
        ArSpeed(
            dataset="pg19", context="4K", temperature=0.0, speed=Interval(139.5, 136.25, 141.75),
            num_prompts=9, num_documents=8,
        ),
    ),
    "a cell of the gate": (
        GATED,
        GatedCell(
            cell=CELL.vary(drafter="candidate", seed=0), name="pg19, context 4K, chunk_topk, B = 256, γ = 4",
            metric="acceptance", candidate=0.55, baseline=0.5, difference=0.05, floor=-0.01, low=0.03,
            high=0.08, num_prompts=9, num_documents=8, num_looping=1, outcome="pass", documents_needed=None,
            documents_if_equal=None, not_looping=Interval(0.04, 0.02, 0.06), other_prompt=None,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("line", "today"), READ.values(), ids=READ)
def test_a_line_of_format_2_is_read_as_todays_row(line: str, today: Row, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(line + "\n", encoding="utf-8")
    (found,) = read_rows(tmp_path / "rows.jsonl", type(today))
    assert found == today
    assert found.model_dump() == today.model_dump(), "the kind of drafter too, which tells no cells apart"


@pytest.mark.parametrize("today", [row for _, row in READ.values()], ids=READ)
def test_a_line_of_today_is_read_back_and_left_alone(today: Row, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [today])
    (found,) = read_rows(tmp_path / "rows.jsonl", type(today))
    assert found == today and found.model_dump() == today.model_dump()
    if isinstance(today, OfCell):
        plain = json.loads(today.model_dump_json())
        assert as_today(plain) is plain


@pytest.mark.parametrize(
    ("kind", "line", "damage", "told"),
    [
        (PromptRow, MEASURED, {"gamma": ...}, "cell gamma Field required"),
        (PromptRow, MEASURED, {"policy": ...}, "cell view policy Field required"),
        (PromptRow, MEASURED, {"budget": "all"}, "cell view budget int Input should be a valid integer"),
        (PromptRow, MEASURED, {"control": "another"}, "cell view control Input should be 'other_prompt'"),
        (PromptRow, MEASURED, {"num_rounds": ...}, "counts num_rounds Field required"),
        (PromptRow, MEASURED, {"kept": "many"}, "counts kept Input should be a valid array"),
        (PromptRow, MEASURED, {"ar_num_tokens": None}, "timing ar_num_tokens Field required"),
        (PromptRow, MEASURED, {"decode_s": 2.0}, "timing decode_s Input should be a valid array"),
        (PromptRow, MEASURED, {"document_id": ...}, "document_id Field required"),
        (PromptRow, MEASURED, {"another": 1}, "another Extra inputs are not permitted"),
        (PredictedRow, PREDICTED, {"speedup_low": ...}, "speedup low Field required"),
        (PredictedRow, PREDICTED, {"speedup_high": None}, "speedup high Input should be a valid number"),
        (PredictedRow, PREDICTED, {"speedup_low": ..., "speedup_high": ...}, "speedup Input should be"),
        (CellRow, MEASURED_CELL, {"acceptance": None}, "acceptance mean Input should be a valid number"),
        (CellRow, MEASURED_CELL, {"speedup": ...}, "speed speedup mean Field required"),
        (CellRow, MEASURED_CELL, {"worst_prompt_speedup": ...}, "speed worst_prompt_speedup Field required"),
        (CellRow, MEASURED_CELL, {"num_clocked": None}, "speed num_clocked Input should be a valid integer"),
        (Estimate, ESTIMATE, {"high": ...}, "value high Field required"),
        (Estimate, ESTIMATE, {"mean": ...}, "value Field required"),
        (Gain, GAIN, {"lost": [0.01, -0.02]}, "lost Input should be"),
        (ArSpeed, AR_SPEED, {"low": None}, "speed low Input should be a valid number"),
        (GatedCell, GATED, {"policy": ...}, "cell view policy Field required"),
    ],
)  # fmt: skip
def test_a_damaged_line_is_refused_by_the_name_of_its_field(
    kind: type[Row], line: str, damage: dict[str, object], told: str, tmp_path: Path
) -> None:
    """`...` takes the field away."""
    values = {name: value for name, value in (json.loads(line) | damage).items() if value is not ...}
    (tmp_path / "rows.jsonl").write_text(f"{line}\n{json.dumps(values)}\n", encoding="utf-8")
    with pytest.raises(BadData, match=f"line 2: no {kind.__name__} of this version, {told}"):
        read_rows(tmp_path / "rows.jsonl", kind)
