"""What a study can see, before its first run: the smallest effect of the primary endpoint, from assumed noise."""

from __future__ import annotations

from ...evaluation.records import prediction
from ...evaluation.study.pictures import Units
from ...evaluation.study.power import planned
from ..eval_config import suites_of
from .spec import BASELINE
from .work import Work


def reach(work: Work) -> str:
    """The smallest difference to the baseline that is found four times in five, by seeds: one line for the plan."""
    power, primary = work.config.power, work.config.primary
    if power is None or primary is None:
        return "smallest effect: not known, as nothing is assumed about noise; power: {seed_sd: ..., disagreement: ...} would say"
    assert power.seed_sd is not None and power.disagreement is not None
    pictures = pictures_asked(work, primary.suite)
    seeds = sorted({len(c.seeds) for c in work.cells.values() if c.name != BASELINE}, reverse=True)
    found = []
    for count in seeds:
        one = planned(count, pictures, seed_sd=power.seed_sd, disagreement=power.disagreement)
        found.append(f"{one.effect:.3f} with {count} seed{'s' if count > 1 else ' (over pictures alone)'}")
    return (
        f"smallest effect on {primary.suite}/{primary.measure} that is found 4 times in 5: {', '.join(found)} "
        f"({pictures:,} pictures or pairs; assumed: seed_sd {power.seed_sd:g}, disagreement {power.disagreement:g})"
    )


def pictures_asked(work: Work, suite: str) -> int:
    """Pictures of a suite, or pairs and whatever else its analysis will resample as one."""
    wanted = suites_of(work.config.evaluation)
    items = list(wanted.suites[suite].load())[: wanted.config.limit]
    return len(Units([prediction(suite, item, "") for item in items], wanted.suites[suite].scorer.name, {}))
