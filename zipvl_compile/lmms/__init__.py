"""`lmms-eval --model zipvl`: its own Hugging Face models, compiled for zipvl and measured; see docs/evaluation.md."""
