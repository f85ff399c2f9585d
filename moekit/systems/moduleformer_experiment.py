"""The check of ModuleFormer's claims: balance, extension, specialisation and speed.

A byte language model learns the manual of the standard library with each balance loss. The one
with mutual information then moves to Python source in several ways: all of it is trained, beside a
dense model; or new modules alone; or with load concentration, after which modules are pruned.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moekit.compare.summary import Spread
from moekit.models.language import MoEDecoderForCausalLM
from moekit.surgery import ModuleUsage, module_usage, prune_modules
from moekit.systems.experiment import Finding, Laboratory, Reproduction, judged
from moekit.systems.moduleformer_runs import (
    BALANCE,
    CONCENTRATION,
    LENGTH,
    MODEL,
    RUNS_A_SEED,
    Budget,
    K,
    Workshop,
    balanced_by,
    built,
    dense,
    dense_of_equal_size,
    extended,
    mean,
    modular,
    tokens_per_second,
)

FULL = Budget(seeds=3, steps=400, tuning=150, batches=16)
QUICK = Budget(seeds=1, steps=12, tuning=6, batches=2)
CUTS = (0.25, 0.5)
CLOSE, OPEN = "concentrated", "not concentrated"
MOVES = ("dense, all weights", "moduleformer, all weights", "moduleformer, new modules")


@dataclass(frozen=True)
class Balanced:
    """A model on held-out text of the domain it has learned.

    Attributes:
        bits: bits a byte.
        marginal, conditional: ``H(m)`` and ``H(m|x)`` in nats, mean over mixtures.
    """

    bits: float
    marginal: float
    conditional: float


@dataclass(frozen=True)
class Moved:
    """Bits a byte of both domains, before and after learning the new one."""

    old_before: float
    old_after: float
    new_before: float
    new_after: float

    @property
    def forgotten(self) -> float:
        """Bits a byte that the old domain lost."""
        return self.old_after - self.old_before

    @property
    def gained(self) -> float:
        """Bits a byte that the new domain won."""
        return self.new_before - self.new_after


@dataclass(frozen=True)
class Cut:
    """What pruning costs: bits a byte of the new domain before, and more of them after."""

    whole: float
    by_use: dict[float, float]
    at_random: dict[float, float]


@dataclass(frozen=True)
class Seed:
    """Everything that was measured with one seed."""

    balanced: dict[str, Balanced]
    moved: dict[str, Moved]
    cuts: dict[str, Cut]


def experiment(lab: Laboratory) -> Reproduction:
    """All four checks; the speed is that of untrained models of the first seed."""
    budget = QUICK if lab.quick else FULL
    numbers = range(lab.seed, lab.seed + budget.seeds)
    seeds = [
        _one_seed(Workshop(lab, budget, seed, index * RUNS_A_SEED, len(numbers) * RUNS_A_SEED))
        for index, seed in enumerate(numbers)
    ]
    speeds = _speeds(lab, budget)
    return Reproduction(
        system="moduleformer",
        setting=f"bytes, {MODEL.depth} blocks of width {MODEL.width}, 8 attention and 16 "
        f"feed-forward modules, {K} of each a token; {budget.steps} steps of 8 x {LENGTH} bytes on "
        f"the manual of the standard library, then {budget.tuning} on its modules' source; balance "
        f"losses weigh 0.01, load concentration 0.1; seeds {', '.join(map(str, numbers))}; bits a "
        "byte on held-out text",
        table=[*_balance_rows(seeds), *_move_rows(seeds), *_cut_rows(seeds), *_speed_rows(speeds)],
        findings=(
            _confident_and_balanced(seeds, lab.quick),
            _new_modules_forget_least(seeds, lab.quick),
            _concentrated_prunes_better(seeds, lab.quick),
            _use_beats_chance(seeds, lab.quick),
            _faster_than_dense(speeds, lab.quick),
        ),
    )


def _one_seed(shop: Workshop) -> Seed:
    trained = {name: shop.pretrained(modular(name)) for name in BALANCE}
    balanced = {
        name: Balanced(shop.bits(model, shop.domains.old), *shop.entropies(model))
        for name, model in trained.items()
    }
    base = trained["mi"]
    starts = {
        MOVES[0]: shop.pretrained(dense()),
        MOVES[1]: balanced_by(base, BALANCE["mi"]),
        MOVES[2]: extended(base, shop.seed),
    }
    befores = {MOVES[0]: starts[MOVES[0]], MOVES[1]: base, MOVES[2]: base}
    moved = {name: _moved(shop, name, befores[name], start) for name, start in starts.items()}
    cuts = {
        name: _cut(shop, shop.tuned(name, balanced_by(base, losses)))
        for name, losses in ((CLOSE, CONCENTRATION), (OPEN, ()))
    }
    return Seed(balanced, moved, cuts)


def _moved(
    shop: Workshop, name: str, before: MoEDecoderForCausalLM, start: MoEDecoderForCausalLM
) -> Moved:
    """Measures ``before`` first, since training changes a dense model where it is."""
    old_before, new_before = (shop.bits(before, d) for d in (shop.domains.old, shop.domains.new))
    model = shop.tuned(name, start)
    return Moved(
        old_before, shop.bits(model, shop.domains.old),
        new_before, shop.bits(model, shop.domains.new),
    )  # fmt: skip


def _cut(shop: Workshop, model: MoEDecoderForCausalLM) -> Cut:
    new = shop.domains.new
    usage = module_usage(model, new.train, max_batches=shop.budget.batches)
    chance = random.Random(shop.seed)
    shuffled = ModuleUsage(
        {name: tuple(chance.random() for _ in values) for name, values in usage.frequency.items()}
    )
    whole = shop.bits(model, new)

    def costs(by: ModuleUsage) -> dict[float, float]:
        pruned = {
            share: prune_modules(model, by, share=share, parts=("feed_forward",)) for share in CUTS
        }
        return {share: shop.bits(smaller, new) - whole for share, smaller in pruned.items()}

    return Cut(whole, costs(usage), costs(shuffled))


def _speeds(lab: Laboratory, budget: Budget) -> dict[str, float]:
    data = Workshop(lab, budget, lab.seed, 0, 1).domains.old
    designs = {"moduleformer": modular("mi"), "dense, as large": dense_of_equal_size()}
    models = {name: built(d, data, lab.seed, lab.device) for name, d in designs.items()}
    lab.progress.timing()
    return tokens_per_second(models, data.validation)


# --- findings -----------------------------------------------------------------------------------


def _confident_and_balanced(seeds: Sequence[Seed], quick: bool) -> Finding:
    found = {name: _balance(seeds, name) for name in BALANCE}
    ours, theirs = found["mi"], found["switch"]
    confident = [s.balanced["switch"].conditional - s.balanced["mi"].conditional for s in seeds]
    comparable = abs(ours.marginal - theirs.marginal) <= 0.1 * theirs.marginal
    return Finding(
        claim="Mutual information balances the load over the corpus while each token's choice is "
        "confident; here: H(m|x) below that of the Switch loss, H(m) within 10% of it",
        measured="; ".join(
            f"{name}: H(m) {b.marginal:.3f}, H(m|x) {b.conditional:.3f}, {b.bits:.3f} bits a byte"
            for name, b in found.items()
        )
        + f"; H(m|x) of switch minus that of mi by seed {_signed(confident)}",
        verdict=judged(comparable and all(gap > 0 for gap in confident), quick=quick),
    )


def _new_modules_forget_least(seeds: Sequence[Seed], quick: bool) -> Finding:
    lost = {name: mean([s.moved[name].forgotten for s in seeds]) for name in MOVES}
    won = {name: mean([s.moved[name].gained for s in seeds]) for name in MOVES}
    least = all(
        s.moved[MOVES[2]].forgotten < min(s.moved[name].forgotten for name in MOVES[:2])
        for s in seeds
    )
    return Finding(
        claim="New modules alone learn a new domain and forget less of the old than training all "
        "weights does; here: least forgotten in each seed, and half the gain of all weights",
        measured="; ".join(
            f"{name}: old domain {lost[name]:+.3f}, new domain {-won[name]:+.3f} bits a byte"
            for name in MOVES
        ),
        verdict=judged(least and won[MOVES[2]] >= won[MOVES[1]] / 2, quick=quick),
    )


def _concentrated_prunes_better(seeds: Sequence[Seed], quick: bool) -> Finding:
    gaps = _gaps(seeds, lambda cuts, share: cuts[OPEN].by_use[share] - cuts[CLOSE].by_use[share])
    return Finding(
        claim="After fine-tuning with load concentration, unused modules can be pruned with little "
        "loss; here: less lost than after fine-tuning without it",
        measured="; ".join(
            f"{share:.0%} pruned: {_pruned(seeds, CLOSE, share)} with and "
            f"{_pruned(seeds, OPEN, share)} without it"
            for share in CUTS
        )
        + f" bits a byte, on top of {_whole(seeds, CLOSE)} with and {_whole(seeds, OPEN)} without",
        verdict=judged(all(mean(values) > 0 for values in gaps.values()), quick=quick),
    )


def _use_beats_chance(seeds: Sequence[Seed], quick: bool) -> Finding:
    gaps = _gaps(
        seeds, lambda cuts, share: cuts[CLOSE].at_random[share] - cuts[CLOSE].by_use[share]
    )
    return Finding(
        claim="The modules to prune are those that the task does not use; here: pruning by use "
        "loses less than pruning at random, after concentration",
        measured="; ".join(
            f"{share:.0%} pruned at random minus by use, by seed {_signed(values)} bits a byte"
            for share, values in gaps.items()
        ),
        verdict=judged(all(gap > 0 for values in gaps.values() for gap in values), quick=quick),
    )


def _faster_than_dense(speeds: dict[str, float], quick: bool) -> Finding:
    ratio = speeds["moduleformer"] / speeds["dense, as large"]
    return Finding(
        claim="Twice the throughput of a dense model of the same quality (README: 71017 against "
        "35559 tokens/s for Pythia 1.4B); here: faster than a dense model of as many parameters",
        measured=f"{speeds['moduleformer']:,.0f} against {speeds['dense, as large']:,.0f} tokens/s "
        f"forward, {ratio:.2f} times",
        verdict=judged(ratio > 1, quick=quick),
    )


# --- table --------------------------------------------------------------------------------------


def _balance(seeds: Sequence[Seed], name: str) -> Balanced:
    found = [s.balanced[name] for s in seeds]
    return Balanced(
        mean([b.bits for b in found]),
        mean([b.marginal for b in found]),
        mean([b.conditional for b in found]),
    )


def _balance_rows(seeds: Sequence[Seed]) -> list[dict[str, Any]]:
    rows = []
    for name in BALANCE:
        found = _balance(seeds, name)
        rows.append(
            {
                "design": name,
                "seeds": len(seeds),
                "mean_active_experts": K,
                "bits_per_byte": found.bits,
                "bits_per_byte_sd": Spread.of([s.balanced[name].bits for s in seeds]).deviation,
                "H(m)": found.marginal,
                "H(m|x)": found.conditional,
            }
        )
    return rows


def _move_rows(seeds: Sequence[Seed]) -> list[dict[str, Any]]:
    return [
        {
            "design": name.removeprefix("moduleformer, "),
            "seeds": len(seeds),
            "mean_active_experts": 1 if name == MOVES[0] else K,
            "old_domain_change": mean([s.moved[name].forgotten for s in seeds]),
            "new_domain_change": -mean([s.moved[name].gained for s in seeds]),
            "new_domain_bits_per_byte": mean([s.moved[name].new_after for s in seeds]),
        }
        for name in MOVES
    ]


def _cut_rows(seeds: Sequence[Seed]) -> list[dict[str, Any]]:
    rows = []
    for name in (CLOSE, OPEN):
        cuts = [s.cuts[name] for s in seeds]
        row: dict[str, Any] = {
            "design": name,
            "seeds": len(seeds),
            "mean_active_experts": K,
            "new_domain_bits_per_byte": mean([cut.whole for cut in cuts]),
        }
        for share in CUTS:
            row[f"pruned_{share:.0%}_by_use"] = mean([cut.by_use[share] for cut in cuts])
            row[f"pruned_{share:.0%}_at_random"] = mean([cut.at_random[share] for cut in cuts])
        rows.append(row)
    return rows


def _speed_rows(speeds: dict[str, float]) -> list[dict[str, Any]]:
    return [
        {
            "design": name,
            "mean_active_experts": 1 if name.startswith("dense") else K,
            "tokens_per_second": speed,
        }
        for name, speed in speeds.items()
    ]


def _gaps(
    seeds: Sequence[Seed], gap: Callable[[dict[str, Cut], float], float]
) -> dict[float, list[float]]:
    """A difference between two ways to prune, by the share that is pruned and by seed."""
    return {share: [gap(seed.cuts, share) for seed in seeds] for share in CUTS}


def _pruned(seeds: Sequence[Seed], name: str, share: float) -> str:
    return f"{mean([s.cuts[name].by_use[share] for s in seeds]):+.4f}"


def _whole(seeds: Sequence[Seed], name: str) -> str:
    return f"{mean([s.cuts[name].whole for s in seeds]):.3f}"


def _signed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:+.4f}" for value in values)
