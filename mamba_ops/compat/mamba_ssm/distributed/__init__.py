"""mamba_ssm.distributed on mamba_ops' operators."""
