"""Fine-tuning a few numbers beside frozen weights: LoRA as peft has it, and TD-LoRA, whose update depends on the timestep."""
