// The few pieces that the charts are drawn from: elements with escaped text, and a document that carries its own style for
// light and dark. No script, no font, nothing loaded: a chart is one file that any viewer of SVG can show.

type Attributes = Readonly<Record<string, string | number>>;

/** Text for XML 1.0: what it cannot carry at all is left out. */
export function escaped(text: string): string {
  return text
    .replace(/[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\u{10000}-\u{10ffff}]/gu, '')
    .replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`);
}

/** An element. Numbers are written to a tenth of a pixel; one that is not finite is a bug of the caller, and said so. */
export function element(name: string, attributes: Attributes, ...children: readonly string[]): string {
  const written = Object.entries(attributes).map(([key, value]) => ` ${key}="${attribute(name, key, value)}"`);
  return children.length === 0
    ? `<${name}${written.join('')}/>`
    : `<${name}${written.join('')}>${children.join('')}</${name}>`;
}

function attribute(name: string, key: string, value: string | number): string {
  if (typeof value === 'string') return escaped(value);
  if (!Number.isFinite(value)) throw new RangeError(`${key} of <${name}> is ${value}`);
  return String(Math.round(value * 10) / 10);
}

export interface TextOptions {
  readonly anchor?: 'start' | 'middle' | 'end';
  /** Class names of the style sheet. */
  readonly class?: string;
}

export function text(x: number, y: number, content: string, options: TextOptions = {}): string {
  const { anchor = 'start', class: style = 't' } = options;
  return element(
    'text',
    { x, y, class: style, ...(anchor === 'start' ? {} : { 'text-anchor': anchor }) },
    escaped(content),
  );
}

export function rect(x: number, y: number, width: number, height: number, style: string, tip?: string): string {
  return element('rect', { x, y, width: Math.max(0, width), height, class: style }, ...tipped(tip));
}

export function line(x1: number, y1: number, x2: number, y2: number, style: string): string {
  return element('line', { x1, y1, x2, y2, class: style });
}

export function dot(cx: number, cy: number, r: number, style: string, tip?: string): string {
  return element('circle', { cx, cy, r, class: style }, ...tipped(tip));
}

/** What a viewer shows when pointed at, and what a screen reader says. */
function tipped(tip: string | undefined): string[] {
  return tip === undefined ? [] : [element('title', {}, escaped(tip))];
}

/** Width that a line of text takes, pixels, in any of the sans-serif fonts; an upper estimate, as nothing measures here. */
export function textWidth(content: string, fontPixels: number): number {
  return content.length * fontPixels * 0.58;
}

/** `content`, cut with an ellipsis to what fits into `width` pixels. */
export function fitted(content: string, width: number, fontPixels: number): string {
  if (textWidth(content, fontPixels) <= width) return content;
  const fits = Math.max(1, Math.floor(width / (fontPixels * 0.58)) - 1);
  return `${content.slice(0, fits).trimEnd()}…`;
}

export interface Drawing {
  readonly title: string;
  /** One or two sentences for those who do not see it. */
  readonly description: string;
  readonly width: number;
  readonly height: number;
  readonly body: readonly string[];
}

/** A complete SVG file. */
export function svgDocument(drawing: Drawing, style: string): string {
  const { width, height } = drawing;
  return `${element(
    'svg',
    {
      xmlns: 'http://www.w3.org/2000/svg',
      width,
      height,
      viewBox: `0 0 ${Math.round(width)} ${Math.round(height)}`,
      role: 'img',
      'aria-labelledby': 'title desc',
    },
    `\n${element('title', { id: 'title' }, escaped(drawing.title))}\n`,
    `${element('desc', { id: 'desc' }, escaped(drawing.description))}\n`,
    `<style>${style}</style>\n`,
    `${rect(0, 0, width, height, 'background')}\n`,
    `${drawing.body.join('\n')}\n`,
  )}\n`;
}
