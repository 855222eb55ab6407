"""DeepSpeed's ZeRO stage 3: the module's own weights are cut too, and gathered layer by layer."""

import torch
from deepspeed.runtime.zero import GatheredParameters, Init
from torch import Tensor, nn
from transformers.integrations import unset_hf_deepspeed_config

from flow_grpo.parallel.deepspeed import DeepSpeed
from flow_grpo.parallel.engine import Parts
from flow_grpo.parallel.plain import PATIENCE_S
from flow_grpo.parallel.sharded import Sharded


class Zero3(DeepSpeed):
    """Each weight is cut into one piece for each rank, equal but for the padding of the last ones.

    What does not train is cut too; what is not in the module, as encoders, VAE and rewards, is not.
    """

    stages = (3,)
    cuts_weights = True

    def __init__(self, mixed_precision: str, patience_s: float = PATIENCE_S):
        super().__init__(mixed_precision, patience_s)
        unset_hf_deepspeed_config()  # transformers would cut every model that it loads

    def _place(self, module: nn.Module) -> None:
        """Cut weight by weight: all at once they may not fit on the device."""
        self._config |= {"data_types": {"grad_accum_dtype": "fp32"}}
        offload = self._config["zero_optimization"].get("offload_param", {})
        offload.setdefault("pin_memory", torch.cuda.is_available())  # else each pass is slow
        dtype = self._accelerator.mixed_precision
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
        for param in module.parameters():
            param.data = param.data.to(dtype)
        for buffer in module.buffers():
            buffer.data = buffer.data.to(self.ranks.device)
        Init(module, config_dict_or_path=self._config, dtype=dtype)

    def _scaled_norm(self) -> Tensor:
        norms = torch.stack(self._zero._get_norm_groups())
        return torch.where((norms < 0).any(), torch.inf, norms.norm())  # -1: not finite

    def _forget(self) -> None:
        self._zero._overflow_clean_up(None)

    def put(self, parts: Parts) -> None:
        zero = self._zero
        zero.checkpoint_event_prologue()  # nothing stays gathered
        Sharded.put(self, parts)
        for row in range(len(self._rows())):
            zero._reassign_or_swap_out_partitioned_parameters(row)
        zero.checkpoint_event_epilogue()  # but what always is

    def whole(self) -> dict[str, Tensor]:
        found = self.module.state_dict()  # of which the buffers are as they should be
        for name, param in self.module.named_parameters():
            with GatheredParameters([param]):
                if self.ranks.is_main:
                    found[name] = param.detach().to("cpu", copy=True)
        return found

    def _held(self, name: str) -> tuple[int, int]:
        size, piece = self._shapes[name].numel(), self._where(name)[2]
        start = min(self.ranks.rank * piece, size)
        return start, min(start + piece, size)

    def _lies(self, name: str) -> tuple[str, int]:
        row, offset, _ = self._where(name)
        return f"row-{row}", offset

    def _master(self, name: str) -> Tensor:
        row, offset, _ = self._where(name)
        start, stop = self._held(name)
        return self._rows()[row].detach().narrow(0, offset, stop - start)

    def _where(self, name: str) -> tuple[int, int, int]:
        """Return the number of the row that holds this rank's piece, its offset and its size."""
        return self._zero.grad_position[self._zero.get_param_id(self._trained[name])]

    def _rows(self) -> list[Tensor]:
        return self._zero.fp32_partitioned_groups_flat
