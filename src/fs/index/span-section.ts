// The `spans` section of a layer index: where decompression can start. Called by format.ts.
import { MAX_SPAN_OUTPUT_BYTES, MAX_WINDOW_BYTES } from './format-limits.ts';
import type { LayerIndex, SpanTable } from './layer-index.ts';
import { indexError, type WireReader, WireWriter } from './wire.ts';

export function encodeSpans(spans: SpanTable, framingLength: number): Buffer {
  const out = new WireWriter();
  const { count } = spans;
  for (let i = 0; i < count; i++) out.varint(spans.outOffset[i]! - (spans.outOffset[i - 1] ?? 0));
  for (let i = 0; i < count; i++) out.varint(spans.inOffset[i]! - (spans.inOffset[i - 1] ?? 0));
  for (let i = 0; i < count; i++) out.u8(spans.bits[i]! * 2 + spans.memberStart[i]!);
  let at = framingLength;
  for (let i = 0; i < count; i++) {
    out.varint(spans.windowLength[i]!);
    if (spans.windowLength[i]! > 0 && spans.windowOffset[i] !== at)
      throw indexError('spans.window', 'windows are not contiguous');
    at += spans.windowLength[i]!;
  }
  return out.bytes();
}

type SpanContext = Pick<LayerIndex, 'layerBytes' | 'tarBytes' | 'compression' | 'restart'>;

/** Decodes `count` spans. Errors: INDEX_INVALID naming the field. */
export function decodeSpans(reader: WireReader, layer: SpanContext, count: number): SpanTable {
  if (count > reader.left) throw indexError('header.spanCount', 'more spans than the section can hold');
  if ((count === 0) !== (layer.tarBytes === 0))
    throw indexError('header.spanCount', `${count} spans for a tar of ${layer.tarBytes} bytes`);
  const spans: SpanTable = {
    count,
    outOffset: new Float64Array(count),
    inOffset: new Float64Array(count),
    bits: new Uint8Array(count),
    memberStart: new Uint8Array(count),
    windowOffset: new Float64Array(count),
    windowLength: new Uint32Array(count),
  };
  for (let i = 0, at = 0; i < count; i++) {
    const step = reader.varint('outOffset', MAX_SPAN_OUTPUT_BYTES);
    if ((step === 0) !== (i === 0)) throw indexError('spans.outOffset', 'spans do not start at 0 or do not ascend');
    at += step;
    if (at >= layer.tarBytes) throw indexError('spans.outOffset', 'a span starts behind the end of the tar');
    spans.outOffset[i] = at;
  }
  if (count > 0 && layer.tarBytes - spans.outOffset[count - 1]! > MAX_SPAN_OUTPUT_BYTES) {
    throw indexError('spans.outOffset', 'the last span is too long');
  }
  for (let i = 0, at = 0; i < count; i++) {
    const step = reader.varint('inOffset', layer.layerBytes);
    at += step;
    if (i === 0 && at !== 0) throw indexError('spans.inOffset', 'the first span does not start at 0');
    if (i > 0 && step === 0) throw indexError('spans.inOffset', 'spans do not ascend');
    if (at >= layer.layerBytes) throw indexError('spans.inOffset', 'a span starts behind the end of the layer');
    spans.inOffset[i] = at;
    if (layer.compression === 'none' && at !== spans.outOffset[i])
      throw indexError('spans.inOffset', 'differs from outOffset');
  }
  for (let i = 0; i < count; i++) {
    const flags = reader.u8('flags');
    if (flags > 15) throw indexError('spans.flags', 'not known');
    spans.memberStart[i] = flags & 1;
    spans.bits[i] = flags >> 1;
    if (spans.bits[i]! > 0 && (layer.compression !== 'gzip' || flags % 2 === 1))
      throw indexError('spans.flags', 'bits out of place');
    if ((flags & 1) === 0 && (layer.compression === 'zstd' || (layer.compression === 'gzip' && i === 0))) {
      throw indexError('spans.flags', 'a span does not start at a member or frame');
    }
  }
  let windowAt = layer.restart.framingLength;
  for (let i = 0; i < count; i++) {
    const length = reader.varint('windowLength', MAX_WINDOW_BYTES);
    const wanted = layer.compression === 'gzip' && spans.memberStart[i] === 0;
    if (length > 0 !== wanted)
      throw indexError('spans.windowLength', wanted ? 'a window is missing' : 'a window is out of place');
    spans.windowLength[i] = length;
    spans.windowOffset[i] = length > 0 ? windowAt : 0;
    windowAt += length;
  }
  if (windowAt !== layer.restart.size) throw indexError('spans.windowLength', 'windows do not fill the restart blob');
  reader.end();
  return spans;
}
