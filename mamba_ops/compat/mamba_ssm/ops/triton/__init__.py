"""mamba_ssm.ops.triton by name alone: these run on mamba_ops' operators and plain torch."""
