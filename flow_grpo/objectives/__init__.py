"""What is optimised. A name in config.objective, and the class behind it."""

OBJECTIVES = {
    "grpo": "flow_grpo.objectives.ratio.grpo:GRPO",
    "nft": "flow_grpo.objectives.forward.nft:NFT",
}
