"""Online reinforcement learning for flow-matching image models."""

import logging

# Before any import of transformers, which says it of each image processor that a pipeline names:
# that torchvision is missing, which nothing here uses.
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision (not installed)" not in record.getMessage()
)
