"""What diffusers and transformers say of prompts that are too long: once, and in our words."""

import logging

LONG = (
    "some prompts are longer than a text encoder reads (CLIP 77 tokens, the others "
    "config.max_sequence_length): their ends are cut off"
)


class Once(logging.Filter):
    """Says LONG for the first message that tells of a prompt's cut, and nothing for the others."""

    def __init__(self) -> None:
        super().__init__()
        self.said = False

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if "input was truncated because" in message:
            first, self.said = not self.said, True
            record.msg, record.args = LONG, ()
            return first
        return "Token indices sequence length is longer" not in message


def say_once() -> None:
    """Install Once where diffusers and transformers write their messages."""
    once = Once()
    for name in ("diffusers", "transformers"):
        for handler in logging.getLogger(name).handlers:
            handler.filters = [old for old in handler.filters if not isinstance(old, Once)]
            handler.addFilter(once)
