"""What every room needs and no room owns: tables, digests, whole files, names, libraries; nothing of LoRA."""
