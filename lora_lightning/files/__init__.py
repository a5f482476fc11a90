"""Adapters on a disk: our format and PEFT's, written, found, checked, loaded and merged; no Trainer."""
