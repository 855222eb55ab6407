"""DeepSpeed's ZeRO stages 1 and 2: each rank steps its own part of the weights, in fp32."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn

from flow_grpo.parallel.engine import Engine, Parts
from flow_grpo.parallel.plain import PATIENCE

BUCKET = 2**26  # elements that full() joins at a time


class DeepSpeed(Engine):
    """The module's weights are whole on each rank and may be of 16 bits; their masters are cut.

    DeepSpeed flattens all masters into one row, of which each rank has an equal piece, so a weight
    may lie on two. This file uses of its optimizer what no public call offers.
    """

    def __init__(self, mixed_precision: str):
        """mixed_precision: no | bf16 | fp16. Raises ValueError for a stage other than 1 and 2."""
        group = InitProcessGroupKwargs(timeout=PATIENCE)
        if not torch.cuda.is_available():
            group.backend = "gloo"
            # Without this DeepSpeed compiles a kernel that gloo does not need.
            import_module("deepspeed.comm.torch").build_shm_op = lambda: None
        super().__init__(Accelerator(mixed_precision=mixed_precision, kwargs_handlers=[group]))
        plugin = self._accelerator.state.deepspeed_plugin
        if plugin.zero_stage not in (1, 2):
            raise ValueError(
                f"DeepSpeed ZeRO stage {plugin.zero_stage} is not supported yet: use stage 2."
            )
        self.num_parts = self.ranks.num_ranks

    def wrap(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float
    ) -> None:
        self._accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": 1,  # it only counts samples by it
            "train_batch_size": "auto",
            "gradient_accumulation_steps": 1,  # accumulate() says where an update ends
            "gradient_clipping": max_grad_norm,
        }
        self.module = module
        self._trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.model, _ = self._accelerator.prepare(module, optimizer)
        self._zero = self.model.optimizer
        self._zero.check_grad_overflow = False  # norm() told, before step() is called
        self.optimizer = self._zero.optimizer
        self.looks_for_scale = self._zero.dynamic_loss_scale

    @contextmanager
    def accumulate(self, last: bool) -> Iterator[None]:
        self.model.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss * self.ranks.num_ranks)  # it averages

    def norm(self) -> Tensor:
        return (self._zero.scaled_global_norm() / self._zero.loss_scale).to(self.ranks.device)

    def step(self, norm: float) -> None:
        self.model.step()  # which measures the norm once more, and clips by that

    def discard(self, overflow: bool) -> None:
        """Do what DeepSpeed does after an overflow, which it does not offer by itself."""
        zero = self._zero
        zero.zero_grad()
        if zero.cpu_offload:
            zero.reset_cpu_buffers()
        for sums in (zero.averaged_gradients, zero.all_grad_tensors):
            sums.update(dict.fromkeys(sums))
        zero.micro_step_id = -1  # so that the next backward pass is an update's first
        if overflow and self.looks_for_scale:
            zero.loss_scaler.update_scale(True)

    def masters(self) -> Parts:
        return {
            name: param._hp_mapping.hp_fragment.detach()
            for name, param in self._trained.items()
            if param._hp_mapping is not None
        }

    @torch.no_grad()
    def put(self, parts: Parts) -> None:
        for name, master in self.masters().items():
            master.copy_(parts[name])
        self._zero.update_lp_params()

    def full(self, parts: Parts) -> Iterator[tuple[str, Tensor]]:
        held = {name: slice(*where["held"]) for name, where in self._layout().items()}
        for names in self._buckets():
            sizes = [self._trained[name].numel() for name in names]
            row = torch.zeros(sum(sizes), device=self.ranks.device)
            values = dict(zip(names, row.split(sizes), strict=True))
            for name in values.keys() & parts.keys():
                values[name][held[name]] = parts[name].to(row.device)
            for name, value in zip(names, self.ranks.total(row).split(sizes), strict=True):
                yield name, value.view(self._trained[name].shape)

    def _buckets(self) -> Iterator[list[str]]:
        """Cut the weights' names into runs of about BUCKET elements."""
        names, size = [], 0
        for name, param in self._trained.items():
            if names and size + param.numel() > BUCKET:
                yield names
                names, size = [], 0
            names.append(name)
            size += param.numel()
        yield names

    def _layout(self) -> dict[str, dict]:
        layout = {}
        for name, param in self._trained.items():
            start = stop = 0
            if param._hp_mapping is not None:
                where = param._hp_mapping.lp_fragment_address
                start, stop = where.start, where.start + where.numel
            layout[name] = {"shape": list(param.shape), "held": [start, stop]}
        return layout

    def _stepped(self) -> dict[str, Tensor]:
        rows = self._zero.single_partition_of_fp32_groups
        return {f"row-{i}": row for i, row in enumerate(rows)}

    def _scale(self) -> dict[str, float]:
        if not self.looks_for_scale:
            return {}
        search = vars(self._zero.loss_scaler)
        return {key: value for key, value in search.items() if isinstance(value, (int, float))}

    def _set_scale(self, scale: dict[str, float]) -> None:
        vars(self._zero.loss_scaler).update(scale)
