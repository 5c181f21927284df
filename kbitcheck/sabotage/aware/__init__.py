"""Preparations that know where they run. They import nothing of this package: KB213 and KB514 copy this folder."""
