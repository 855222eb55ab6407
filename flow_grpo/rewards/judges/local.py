"""A vision-language model of transformers as a judge: Qwen2-VL, Qwen2.5-VL, Qwen3-VL."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from threading import Lock

import torch
from PIL import Image

from flow_grpo.rewards.judges.probability import Question, forms


class LocalJudge:
    """Asks a model of the process, `batch_size` questions a call; bf16 on a GPU, fp32 on a CPU.

    Pictures are prepared by PIL, whether torchvision is there or not.
    """

    def __init__(self, path: str, revision: str, device: str, batch_size: int):
        from transformers import AutoModelForImageTextToText, AutoTokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )

        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        model = AutoModelForImageTextToText.from_pretrained(
            path, revision=revision, dtype=dtype, use_safetensors=True
        )
        if not model.config.model_type.startswith(("qwen2_vl", "qwen2_5_vl", "qwen3_vl")):
            raise ValueError(
                f"config.rewards.vlm={path!r} is a {model.config.model_type}; Qwen2-VL, Qwen2.5-VL "
                f"and Qwen3-VL are read here. Serve another one by vLLM or sglang, and name its "
                f"endpoint in config.rewards.vlm_url."
            )
        self.model = model.eval().requires_grad_(False).to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, padding_side="left")
        self.prepare = Qwen2VLImageProcessorPil.from_pretrained(path, revision=revision)
        self.batch_size = batch_size
        self._asking = Lock()  # rewards that share a judge have threads of their own

    def ask(self, questions: Sequence[Question]) -> list[float]:
        """Return each answer's probability, as the first token that the model would say."""
        with self._asking:
            starts = range(0, len(questions), self.batch_size)
            parts = [self._ask(questions[start : start + self.batch_size]) for start in starts]
        return [value for part in parts for value in part]

    @torch.inference_mode()
    def _ask(self, questions: Sequence[Question]) -> list[float]:
        pictures = [Image.fromarray(image) for each in questions for image in each.images]
        seen = self.prepare(pictures, return_tensors="pt")
        sizes = iter((seen["image_grid_thw"].prod(-1) // self.prepare.merge_size**2).tolist())
        texts = [self._text(each, sizes) for each in questions]
        tokens = self.tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
        is_image = tokens["input_ids"] == self.model.config.image_token_id
        inputs = {**seen, **tokens, "mm_token_type_ids": is_image.int()}
        inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
        logits = self.model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1]
        every = logits.float().log_softmax(-1).cpu()
        return [self._share(row, each) for row, each in zip(every, questions, strict=True)]

    def _text(self, question: Question, sizes: Sequence[int]) -> str:
        """Write a question as the model's chat has it, with a mark for each patch of a picture."""
        mark = self.tokenizer.convert_ids_to_tokens(self.model.config.image_token_id)
        said = question.text.replace("<|", "< |")  # a prompt's marks are text to us
        content = [{"type": "image"}] * len(question.images) + [{"type": "text", "text": said}]
        before, *behind = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        ).split(mark)
        assert len(behind) == len(question.images), "the chat template shows no picture"
        return before + "".join(mark * next(sizes) + text for text in behind)

    def _share(self, log_probs: torch.Tensor, question: Question) -> float:
        answer = log_probs[self._ids(question.answer)].logsumexp(0)
        if not question.others:
            return answer.exp().item()
        others = [log_probs[self._ids(each)] for each in question.others]
        return (answer - torch.cat([answer[None], *others]).logsumexp(0)).exp().item()

    def _ids(self, answer: str) -> list[int]:
        encoded = [
            self.tokenizer.encode(form, add_special_tokens=False) for form in forms([answer])
        ]
        ids = sorted({ids[0] for ids in encoded if len(ids) == 1})
        if not ids:
            raise ValueError(f"the answer {answer!r} is no single token of the judge's model")
        return ids

    def close(self) -> None:
        """Keep the model: other rewards may share it."""


@cache
def load(path: str, revision: str, device: str, batch_size: int) -> LocalJudge:
    """Load a judge from a folder or the hub, once a process."""
    return LocalJudge(path, revision, device, batch_size)
