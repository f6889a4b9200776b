// The phases of a start as a coloured band along a time axis, named inside where the name fits.
import type { Scale } from './axis.ts';
import { duration } from './quantities.ts';
import { rect, text, textWidth } from './svg.ts';
import { FONT_PIXELS, phaseFill } from './theme.ts';

/** Half-open, milliseconds from the beginning of the pull. */
export interface Phase {
  /** Decides the colour. */
  readonly name: string;
  /** What is written, where it is not the name. */
  readonly label?: string;
  readonly fromMs: number;
  readonly toMs: number;
}

export interface PhaseEnd {
  readonly name: string;
  readonly label?: string;
  readonly atMs: number;
}

/** Phases in a row from the ends of each; ends out of order would draw backwards, so they are sorted. */
export function phasesFromEnds(ends: readonly PhaseEnd[]): Phase[] {
  let fromMs = 0;
  return [...ends]
    .sort((a, b) => a.atMs - b.atMs)
    .map(({ atMs, ...end }) => {
      const phase = { ...end, fromMs, toMs: atMs };
      fromMs = atMs;
      return phase;
    });
}

export function phaseBand(phases: readonly Phase[], x: Scale, top: number, height: number): string[] {
  return phases.flatMap((phase) => {
    if (phase.toMs <= phase.fromMs) return [];
    const width = x(phase.toMs) - x(phase.fromMs);
    const length = duration(phase.toMs - phase.fromMs);
    const name = phase.label ?? phase.name;
    const label = [`${name} ${length}`, name].find((each) => textWidth(each, FONT_PIXELS.small) + 8 <= width);
    return [
      rect(x(phase.fromMs), top, Math.max(width, 1), height, phaseFill(phase.name), `${name}: ${length}`),
      ...(label === undefined ? [] : [text(x(phase.fromMs) + 5, top + height / 2 + 4, label, { class: 'm' })]),
    ];
  });
}
