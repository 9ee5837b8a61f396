"""Databases below the exits: what may come next, for almost nothing (Hierarchy Drafting)."""

from __future__ import annotations

from hispec.sources.source import GRADES, Candidate, Source

__all__ = ["GRADES", "Candidate", "Source"]
