"""`lmms-eval --model zipvl`: lmms-eval's own Hugging Face models, compiled for zipvl and measured; docs/evaluation.md."""
