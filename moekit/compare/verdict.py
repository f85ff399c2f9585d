"""The verdict in words: which design, by how much, at what cost, and how sure."""

from __future__ import annotations

from collections.abc import Sequence

from moekit.compare.record import RunRecord
from moekit.compare.summary import DesignSummary, Spread, paired_difference


def verdict(records: Sequence[RunRecord], summaries: Sequence[DesignSummary]) -> list[str]:
    """Sentences, the most important first."""
    fair = [summary for summary in summaries if summary.causal]
    sentences = []
    if fair:
        ranked = sorted(fair, key=lambda summary: summary.loss.mean)
        sentences += [_best(records, ranked), *_cost(records, ranked)]
    sentences += [_not_causal(summary) for summary in summaries if not summary.causal]
    sentences += _caveats(records, summaries)
    return sentences


def _best(records: Sequence[RunRecord], ranked: Sequence[DesignSummary]) -> str:
    best = ranked[0]
    loss = f"{best.loss.mean:.4f} nats a token, perplexity {best.perplexity.mean:.1f}"
    opening = f"{best.design} has the lowest validation loss ({loss})"
    if len(ranked) == 1:
        return f"{best.design} was run alone: {loss}."
    rivals = [
        (rival, paired_difference(records, best.design, rival.design)) for rival in ranked[1:]
    ]
    if rivals[0][1].half_width is None:
        second, gap = rivals[0]
        return (
            f"{opening}, {gap.mean:.4f} below {second.design}; with one seed there is no telling "
            "that from chance: run at least three seeds."
        )
    ahead = [rival.design for rival, gap in rivals if _clear(gap)]
    level = [rival.design for rival, gap in rivals if not _clear(gap)]
    gaps = ", ".join(f"{rival.design} {_interval(gap)}" for rival, gap in rivals)
    if not ahead:
        decided = "but no difference is clear of chance"
    elif not level:
        decided = "and is ahead of every other design beyond chance"
    else:
        decided = (
            f"and is ahead of {_listed(ahead)} beyond chance, but not clearly of {_listed(level)}"
        )
    return (
        f"{opening} {decided}. Loss above it, with 95% intervals over {best.seeds} seeds: {gaps}."
    )


def _cost(records: Sequence[RunRecord], ranked: Sequence[DesignSummary]) -> list[str]:
    """The cheapest design whose loss is not clearly worse than the best."""
    best = ranked[0]
    level = [best]
    for rival in ranked[1:]:
        gap = paired_difference(records, best.design, rival.design)
        if gap.half_width is not None and not _clear(gap):
            level.append(rival)
    cheapest = min(level, key=lambda summary: summary.flops_per_token)
    if cheapest is best:
        return []
    saved = 1 - cheapest.flops_per_token / best.flops_per_token
    return [
        f"{cheapest.design} is the cheapest design not clearly worse than {best.design}: it "
        f"computes {saved:.0%} less a token ({cheapest.flops_per_token / 1e6:.2f} against "
        f"{best.flops_per_token / 1e6:.2f} MFLOP forward) with "
        f"{cheapest.feed_forward_experts.mean:.2f} feed-forward experts a token."
    ]


def _not_causal(summary: DesignSummary) -> str:
    return (
        f"{summary.design} ({summary.loss.mean:.4f}) is left out of the ranking: its router looks "
        "at later tokens, so its loss is not that of a model that can generate."
    )


def _caveats(records: Sequence[RunRecord], summaries: Sequence[DesignSummary]) -> list[str]:
    caveats = []
    tokens = max(record.tokens for record in records)
    falling = [s.design for s in summaries if _still_falling(records, s.design)]
    if falling:
        caveats.append(
            f"After {tokens:,} tokens the loss of {_listed(falling)} was still falling; "
            "the order may change with more training."
        )
    return caveats


def _still_falling(records: Sequence[RunRecord], design: str) -> bool:
    """Whether the last fifth of training lowered the training loss by more than 1%."""
    for record in records:
        losses = [row["loss"] for row in record.history if "loss" in row]
        if record.design == design and len(losses) >= 10:
            fifth = len(losses) // 5
            late = sum(losses[-fifth:]) / fifth
            before = sum(losses[-2 * fifth : -fifth]) / fifth
            return late < 0.99 * before
    return False


def _clear(gap: Spread) -> bool:
    """Whether the 95% interval of a paired difference lies above 0."""
    return gap.half_width is not None and gap.mean - gap.half_width > 0


def _interval(gap: Spread) -> str:
    assert gap.half_width is not None
    return f"{gap.mean:+.4f} ± {gap.half_width:.4f}"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
