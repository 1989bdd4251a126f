"""Mixture-of-Experts: routing replay, frozen routers, the names of experts."""
