"""fastvae."""
