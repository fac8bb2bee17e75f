"""What a run knows beside its learner's state, agreed on by the workers of a new generation: who
kept the run's records may be the one who was lost."""

import torch

from train.elastic.run import ElasticRun
from train.world import World

LAST = ("step", "samples", "loss", "gradient_norm", "learning_rate")
WHOLE = ("step", "samples")


def share_facts(run: ElasticRun, world: World) -> None:
    """All take over the longest time and highest price that anybody knows, and the last finished
    step from whoever has finished it. Collective."""
    status = run.journal.status
    told = [run.last.get(name, -1.0) for name in LAST]
    mine = torch.tensor([*told, status.trained_s, status.usd], dtype=torch.float64)
    rows = world.all_gather(mine)
    run.spend(max(float(row[-2]) for row in rows), max(float(row[-1]) for row in rows))
    at = run.trainer.step_number
    found = [row for row in rows if int(row[0]) == at]
    run.last = {}
    if at and found:
        pairs = zip(LAST, found[0].tolist(), strict=False)
        run.last = {name: int(v) if name in WHOLE else v for name, v in pairs}
