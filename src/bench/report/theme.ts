// Colours of the charts, in light and dark, and what each stands for. Written as classes and not as variables of CSS,
// which some renderers of SVG do not know. Hues differ in lightness too, for eyes that do not tell them apart.
import type { RequestTime } from '../result.ts';

interface Colour {
  readonly light: string;
  readonly dark: string;
}

/** By place in `BenchResult.snapshotters`: yardstick, ours, peers. */
const SERIES: readonly Colour[] = [
  { light: '#6b7280', dark: '#9aa3b2' },
  { light: '#0b62c4', dark: '#58a6ff' },
  { light: '#c2590a', dark: '#f0a050' },
  { light: '#7b3fb5', dark: '#c297ff' },
  { light: '#0f7b6c', dark: '#4fd1b5' },
];

/** Windows look like the indexes that they were made with. */
type RequestLook = Exclude<RequestTime['kind'], 'window'>;

const REQUESTS: Readonly<Record<RequestLook, Colour>> = {
  token: { light: '#c62828', dark: '#ff7b72' },
  manifest: { light: '#ad3f91', dark: '#e68fd0' },
  config: { light: '#c2590a', dark: '#f0a050' },
  index: { light: '#0a7d55', dark: '#45cf9a' },
  layer: { light: '#0b62c4', dark: '#58a6ff' },
  other: { light: '#6b7280', dark: '#9aa3b2' },
};

/** Phases of a start in their order; a mark of any other name takes `PHASE_OTHER`. */
export const PHASES: readonly string[] = ['control', 'pull', 'create', 'run'];
const PHASE_COLOURS: readonly Colour[] = [
  { light: '#dccdf5', dark: '#4a3a6b' },
  { light: '#c7dbf6', dark: '#1f4173' },
  { light: '#f5deb0', dark: '#66501a' },
  { light: '#c5eac5', dark: '#1f5430' },
];
const PHASE_OTHER: Colour = { light: '#dfe3e8', dark: '#3a424d' };

export const REQUEST_KINDS = Object.keys(REQUESTS) as RequestLook[];

export function seriesFill(place: number): string {
  return `f${Math.min(Math.max(place, 0), SERIES.length - 1)}`;
}

export function seriesLine(place: number): string {
  return `l${Math.min(Math.max(place, 0), SERIES.length - 1)}`;
}

export function requestFill(kind: RequestTime['kind']): string {
  return `q-${kind === 'window' ? 'index' : kind}`;
}

export function phaseFill(name: string): string {
  const place = PHASES.indexOf(name);
  return place < 0 ? 'p-other' : `p${place}`;
}

export const FONT_PIXELS = { text: 12, small: 11, title: 16 } as const;

/** The style sheet of every chart. */
export function styleSheet(): string {
  const dark = rules('dark').replaceAll('\n', '\n  ');
  return [
    '',
    'text { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }',
    `.t { font-size: ${FONT_PIXELS.text}px; } .s, .m { font-size: ${FONT_PIXELS.small}px; }`,
    `.h { font-size: ${FONT_PIXELS.title}px; font-weight: 600; } .b { font-size: ${FONT_PIXELS.text}px; font-weight: 600; }`,
    '.bar { fill-opacity: 0.45; } .dots { fill-opacity: 0.9; stroke-width: 0.8; }',
    '.whisker, .median { stroke-width: 1.5; } .median { stroke-width: 2.5; }',
    '.floor-line { stroke-width: 1.5; stroke-dasharray: 4 3; } .thick { stroke-width: 5; stroke-opacity: 0.5; } .axis, .one { stroke-width: 1; } .one { stroke-width: 1.5; }',
    '.grid { stroke-width: 0.7; } .curve { fill: none; stroke-width: 1.6; stroke-linejoin: round; }',
    '.mark { stroke-width: 1; stroke-dasharray: 2 3; }',
    rules('light'),
    `@media (prefers-color-scheme: dark) {\n  ${dark}\n}`,
    '',
  ].join('\n');
}

function rules(mode: keyof Colour): string {
  const light = mode === 'light';
  const ink = light ? '#1c2128' : '#e6e9ee';
  const quiet = light ? '#59616c' : '#a3adba';
  const paper = light ? '#ffffff' : '#12161c';
  const slower = light ? '#b3123b' : '#ff8fa8';
  const faster = light ? '#0a6b48' : '#45cf9a';
  return [
    `.background { fill: ${paper}; } .t, .h, .b { fill: ${ink}; } .s { fill: ${quiet}; } .m { fill: ${ink}; }`,
    `.axis { stroke: ${quiet}; } .grid { stroke: ${light ? '#e3e6ea' : '#2a313b'}; } .one { stroke: ${ink}; }`,
    `.whisker { stroke: ${ink}; } .dots { stroke: ${paper}; } .floor-line { stroke: ${ink}; } .floor-text { fill: ${ink}; }`,
    `.slower { fill: ${slower}; font-weight: 600; } .faster { fill: ${faster}; font-weight: 600; }`,
    ...SERIES.map((colour, at) => `.f${at} { fill: ${colour[mode]}; } .l${at} { stroke: ${colour[mode]}; }`),
    REQUEST_KINDS.map((kind) => `.q-${kind} { fill: ${REQUESTS[kind][mode]}; }`).join(' '),
    PHASE_COLOURS.map((colour, at) => `.p${at} { fill: ${colour[mode]}; }`).join(' '),
    `.p-other { fill: ${PHASE_OTHER[mode]}; }`,
  ].join('\n');
}
