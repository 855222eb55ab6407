"""DeepSpeed's ZeRO stages 1 and 2: each rank steps its own part of the weights, in fp32."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn

from flow_grpo.parallel.engine import Parts
from flow_grpo.parallel.holds import MOST
from flow_grpo.parallel.plain import PATIENCE_S
from flow_grpo.parallel.sharded import Sharded


class DeepSpeed(Sharded):
    """The module's weights are whole on each rank and may be of 16 bits; their masters are cut.

    DeepSpeed flattens all masters into one row, of which each rank has an equal piece, so a weight
    may lie on two. This file uses of its optimizer what no public call offers.
    """

    stages: tuple[int, ...] = (1, 2)

    def __init__(self, mixed_precision: str, patience_s: float = PATIENCE_S):
        """mixed_precision: no | bf16 | fp16. Raises ValueError for a stage that is another's."""
        group = InitProcessGroupKwargs(timeout=timedelta(seconds=patience_s))
        if not torch.cuda.is_available():
            group.backend = "gloo"
            # Without this DeepSpeed compiles a kernel that gloo does not need.
            import_module("deepspeed.comm.torch").build_shm_op = lambda: None
        # Of torch's newest collectives, at each call.
        warnings.filterwarnings("ignore", ".* is deprecated", FutureWarning, "torch.distributed")
        super().__init__(Accelerator(mixed_precision=mixed_precision, kwargs_handlers=[group]))
        plugin = self._accelerator.state.deepspeed_plugin
        if plugin.zero_stage not in self.stages:
            raise ValueError(
                f"DeepSpeed ZeRO stage {plugin.zero_stage}: 1, 2 or 3 is needed, as zero_stage in "
                f"accelerate's config, as those of scripts/accelerate_configs have it."
            )
        self._config = plugin.deepspeed_config

    def wrap(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float
    ) -> None:
        self._config |= {
            "train_micro_batch_size_per_gpu": 1,  # it only counts samples by it
            "train_batch_size": self.ranks.num_ranks,
            "gradient_accumulation_steps": 1,  # accumulate() says where an update ends
            "gradient_clipping": max_grad_norm,
            "zero_force_ds_cpu_optimizer": False,  # torch's, which compiles nothing
        }
        self._take(module)
        # It keeps a buffer of this size, however little trains.
        trained = sum(shape.numel() for shape in self._shapes.values())
        self._config["zero_optimization"].setdefault("reduce_bucket_size", min(MOST, trained))
        self._place(module)
        self.model, _ = self._accelerator.prepare(module, optimizer)
        self._zero = self.model.optimizer
        self._zero.check_grad_overflow = False  # norm() told, before step() is called
        self.optimizer = self._zero.optimizer
        self.looks_for_scale = self._zero.dynamic_loss_scale

    def _place(self, module: nn.Module) -> None:
        """Bring what trains to the device, where DeepSpeed would not do so as it should."""

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        self.model.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss * self.ranks.num_ranks)  # it averages

    def norm(self) -> Tensor:
        return (self._scaled_norm() / self._zero.loss_scale).to(self.ranks.device)

    def _scaled_norm(self) -> Tensor:
        return self._zero.scaled_global_norm()

    def step(self, norm: float) -> None:
        self.model.step()  # which measures the norm once more, and clips by that

    def discard(self, overflow: bool) -> None:
        """Do what DeepSpeed does after an overflow, which it does not offer by itself."""
        self._forget()
        if overflow and self.looks_for_scale:
            self._zero.loss_scaler.update_scale(True)

    def _forget(self) -> None:
        zero = self._zero
        zero.zero_grad()
        if zero.cpu_offload:
            zero.reset_cpu_buffers()
        for sums in (zero.averaged_gradients, zero.all_grad_tensors):
            sums.update(dict.fromkeys(sums))
        zero.micro_step_id = -1  # so that the next backward pass is an update's first

    def put(self, parts: Parts) -> None:
        super().put(parts)
        self._zero.update_lp_params()

    def _held(self, name: str) -> tuple[int, int]:
        if (mapping := self._trained[name]._hp_mapping) is None:
            return 0, 0
        where = mapping.lp_fragment_address
        return where.start, where.start + where.numel

    def _lies(self, name: str) -> tuple[str, int]:
        mapping = self._trained[name]._hp_mapping
        return f"row-{mapping.param_group_index}", mapping.hp_fragment_address.start

    def _master(self, name: str) -> Tensor:
        return self._trained[name]._hp_mapping.hp_fragment.detach()

    def _stepped(self) -> dict[str, Tensor]:
        return {f"row-{i}": row for i, row in enumerate(self._rows())}

    def _rows(self) -> list[Tensor]:
        return self._zero.single_partition_of_fp32_groups

    def _scale(self) -> dict[str, float]:
        if not self.looks_for_scale:
            return {}
        search = vars(self._zero.loss_scaler)
        return {key: value for key, value in search.items() if isinstance(value, (int, float))}

    def _set_scale(self, scale: dict[str, float]) -> None:
        vars(self._zero.loss_scaler).update(scale)
