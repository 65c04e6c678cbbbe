"""mamba_ssm.utils on mamba_ops' operators."""
