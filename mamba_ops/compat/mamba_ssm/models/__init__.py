"""mamba_ssm.models on mamba_ops' operators."""
