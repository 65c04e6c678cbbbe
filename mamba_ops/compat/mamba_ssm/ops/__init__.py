"""mamba_ssm.ops on mamba_ops' operators."""
