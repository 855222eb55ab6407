"""An epoch's start, kept until its updates are over: a run that ends among them loses nothing."""

from torch import Tensor

from flow_grpo.parallel.engine import Engine
from flow_grpo.training.optimizer import Updater
from flow_grpo.training.snapshots import Snapshots


class Held:
    """What updates change, as it was before the first one, on the host."""

    def __init__(self, engine: Engine, snapshots: Snapshots, updater: Updater):
        self._engine, self._snapshots, self._updater = engine, snapshots, updater
        masters, moments, self._scale = engine.get_state()
        self._masters, self._copies = _copies(masters), _copies(snapshots.state_dict())
        self._moments = {name: _copies(values) for name, values in moments.items()}
        self._counts = (updater.num_updates, updater.num_skipped)

    def restore(self) -> None:
        self._engine.set_state(self._masters, self._moments, self._scale)
        self._snapshots.load_state_dict(self._copies)
        self._updater.num_updates, self._updater.num_skipped = self._counts


def _copies(values: dict) -> dict:
    return {
        name: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
        for name, value in values.items()
    }
