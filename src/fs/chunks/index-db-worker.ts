// Worker thread that is the only writer of index.db: takes calls from IndexDb one after the other and answers each.
import { parentPort } from 'node:worker_threads';
import { DedupError, errorCode } from '../../errors.ts';
import type { IndexCallMessage, IndexCalls, IndexOp, IndexReplyMessage } from './index-protocol.ts';
import { IndexWriter } from './index-writer.ts';

let writer: IndexWriter | undefined;

function opened(): IndexWriter {
  if (writer === undefined) throw new DedupError('CLOSED', 'index.db is not open');
  return writer;
}

type Handlers = { [Op in IndexOp]: (args: IndexCalls[Op]['args']) => IndexCalls[Op]['result'] };

function done(_nothing: unknown): null {
  return null;
}

const handlers: Handlers = {
  open: (args) => {
    const result = IndexWriter.open(args);
    writer = result.writer;
    return result.answer;
  },
  addLayer: (args) => opened().addLayer(args),
  holdChunks: (args) => opened().holdChunks(args),
  releaseHold: (args) => opened().releaseHold(args.hold),
  dropUnreferenced: (args) => opened().dropUnreferenced(args.generation),
  layers: () => opened().layers(),
  confirmLayer: (args) => opened().confirmLayer(args.layerId),
  layerAddresses: (args) => opened().layerAddresses(args.layerId),
  addSources: (args) => done(opened().addSources(args.layerId, args.sources)),
  setLayerState: (args) => done(opened().setLayerState(args.layerId, args)),
  dropLayers: (args) => opened().dropLayers(args.layerIds, args.generation),
  punched: (args) => done(opened().punched(args.ranges)),
  markDurable: (args) => done(opened().markDurable(args)),
  quarantined: () => opened().quarantined(),
  endQuarantine: (args) => done(opened().endQuarantine(args.ranges, args.generation)),
  coldChunks: (args) => opened().coldChunks(args),
  evict: (args) => opened().evict(args),
  evictedPunched: (args) => done(opened().evictedPunched(args.blocks)),
  imageUse: () => opened().imageUse(),
  createImage: (args) => opened().createImage(args.key, args.layers, args.ahead),
  imageReady: (args) => done(opened().imageReady(args.id, args.metadataBytes)),
  images: () => opened().images(),
  dropImage: (args) => done(opened().dropImage(args.id)),
  pin: (args) => done(opened().pin(args.mountId, args.layers)),
  unpin: (args) => done(opened().unpin(args.mountId)),
  unpinAll: () => done(opened().unpinAll()),
  layerPresence: (args) => opened().layerPresence(args.layerId),
  addDirect: (args) => done(opened().addDirect(args)),
  dropDirect: (args) => done(opened().dropDirect(args.imageId, args.pinned)),
  numberImagesAbove: (args) => done(opened().numberImagesAbove(args.imageId)),
  directMounts: () => opened().directMounts(),
  totals: () => opened().totals(),
  checkpoint: () => done(opened().checkpoint()),
  close: () => {
    writer?.close();
    writer = undefined;
    return null;
  },
};

function sqliteCode(error: unknown): string | undefined {
  const code = (error as { code?: unknown } | null)?.code;
  return typeof code === 'string' && code.startsWith('SQLITE_') ? code : undefined;
}

function codeOf(error: unknown): string {
  const sqlite = sqliteCode(error);
  if (sqlite === undefined) return errorCode(error);
  return sqlite.startsWith('SQLITE_FULL') ? 'STORE_FULL' : 'STORE_IO';
}

const port = parentPort;
if (port === null) throw new DedupError('INTERNAL', 'the index.db writer runs in a worker thread only');
port.on('message', (message: IndexCallMessage) => {
  let reply: IndexReplyMessage;
  try {
    const handler = handlers[message.op] as (args: unknown) => unknown;
    reply = { id: message.id, result: handler(message.args) };
  } catch (error) {
    const text = error instanceof Error ? error.message : String(error);
    reply = { id: message.id, error: { code: codeOf(error), message: `index.db ${message.op}: ${text}` } };
  }
  port.postMessage(reply);
  if (message.op === 'close') port.close();
});
