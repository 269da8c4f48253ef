"""The published tables of PIPO and FlexGen, predicted by the planner's simulator."""
