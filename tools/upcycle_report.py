"""What `scatterfold upcycle` prints: the plan, what was written, and what was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..moe.interop.write import WriteReceipt
    from ..moe.upcycle import Measured, UpcyclePlan

Rows = list[tuple[str, str]]
GIB = 2**30


def plan_rows(plan: UpcyclePlan) -> Rows:
    """Name and value of each line about what will be made."""
    before, after, settings = plan.before, plan.after, plan.settings
    frozen = after.parameters - after.trained
    per_parameter = "16 bytes a parameter: weight, gradient, Adam in float32"
    if frozen:
        per_parameter = f"16 bytes a trained parameter, 4 for {_count(frozen)} frozen ones"
    return [
        ("source", ", ".join(plan.sources)),
        ("method", f"{plan.method}, {settings.experts} experts, {_experts_per_token(plan)}"),
        ("layers", f"{len(plan.moe_layers)} of {plan.layers} become MoE layers"),
        ("format", plan.to if plan.architecture is None else f"{plan.to}, {plan.architecture}"),
        ("parameters", f"{_count(before.parameters)} -> {_count(after.parameters)}"),
        ("active", f"{_count(before.active)} -> {_count(after.active)} per token"),
        (
            "FLOPs",
            f"{before.flops_per_token:.3g} -> {after.flops_per_token:.3g} per token, forward and backward at "
            f"{after.sequence:,} tokens",
        ),
        (
            "training",
            f"{_bytes(plan.training_bytes)} on each of {plan.gpus} GPUs without activations ({per_parameter})",
        ),
        ("exact", f"{'yes' if plan.exact else 'no'}: {plan.why}"),
    ]


def written_rows(written: WriteReceipt) -> Rows:
    """Lines about the folder."""
    files = f"{len(written.files):,} files" if len(written.files) > 1 else "".join(written.files)
    optimizer = ", with the optimizer's state" if written.optimizer else ""
    return [("output", f"{written.output}, {files}, {_bytes(written.bytes)} ({written.dtype}){optimizer}")]


def measured_rows(measured: Measured, plan: UpcyclePlan, written: WriteReceipt) -> Rows:
    """Lines about source and result on the probe."""
    rows: Rows = []
    for difference in measured.sources:
        of = "" if len(measured.sources) == 1 else f" from {difference.source}"
        loss = "" if difference.loss is None else f"; loss {difference.loss:.4f} -> {measured.loss:.4f}"
        rows.append(
            (
                "difference",
                f"{difference.largest:.2e} at most between logits{of}, {difference.relative:.1e} of the largest{loss}",
            )
        )
    if plan.exact and not measured.exact and written.dtype != "fp32":
        rows.append(("", f"the constant's factors are rounded to {written.dtype}; scale=down rounds no power of two"))
    rows.append(("probe", f"{measured.tokens:,} tokens of {measured.probe}, float32, the result as written"))
    rows.append(
        (
            "routing",
            f"{measured.experts_per_token:.2f} experts per token, the busiest has {measured.busiest:.2f} x the mean",
        )
    )
    return rows


def show(rows: Rows) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")


def _experts_per_token(plan: UpcyclePlan) -> str:
    settings = plan.settings
    if settings.router == "threshold":
        return f"threshold {settings.threshold:g}, at most {settings.top_k} per token"
    return f"top-{settings.top_k}"


def _count(number: float) -> str:
    """1,234,567 as it is, and large numbers in millions or billions."""
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if number >= 10 * size:
            return f"{number / size:,.1f}{unit}"
    return f"{number:,.0f}"


def _bytes(number: float) -> str:
    for size, unit in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number:,.0f} bytes"
