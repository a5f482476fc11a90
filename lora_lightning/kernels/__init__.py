"""The autograd functions of the fast path; `lora_lightning.functional` is their public face."""
