"""Quality against kept tokens, KV bytes and counted FLOPs, dense and for every variant: `zipvl eval`."""
