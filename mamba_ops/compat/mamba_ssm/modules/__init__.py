"""mamba_ssm.modules on mamba_ops' operators."""
