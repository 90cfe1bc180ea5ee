"""`redraft check`: what the fine-tune cost, why, and whether adapting pays, from a few prompts."""
