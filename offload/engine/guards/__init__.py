"""Everything that sees a parameter being used: ops, autograd, modules, exchanges."""
