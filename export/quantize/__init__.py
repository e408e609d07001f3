"""Rounding the decoder: GPTQ layer after layer behind what it sees, and the bitsandbytes formats."""
