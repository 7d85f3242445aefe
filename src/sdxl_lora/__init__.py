"""Fine-tune Stable Diffusion XL with LoRA, stage by stage; the stages' scripts are in `stages/`."""
