// The mounted images and how much of each is here: the answer to the RPC ListImages. Called by data-plane.ts; opens layers, and
// changes nothing.
import type { ImageInfoMessage } from './control-server.ts';
import type { LayerProvider } from './loadable-layer.ts';
import type { MountedImage } from './mount-table.ts';

export interface ImageListParts {
  readonly mounts: { list(): readonly MountedImage[] };
  readonly layers: LayerProvider;
  readonly store: { isPresent(address: number, length: number): boolean };
  /** Name of the transport that serves images. */
  readonly transport: string;
}

/** Errors: those of opening a layer. */
export async function listImages({ mounts, layers, store, transport }: ImageListParts): Promise<ImageInfoMessage[]> {
  const found: ImageInfoMessage[] = [];
  for (const image of mounts.list()) {
    const seen = new Set<number>();
    let total = 0;
    let present = 0;
    for (const layer of image.layers) {
      const { index, addresses } = await layers.openLayer(layer.layerId);
      for (let i = 0; i < addresses.length; i++) {
        const address = addresses[i]!;
        const length = index.chunks.length[i]!;
        if (address === 0 || seen.has(address)) continue;
        seen.add(address);
        total += length;
        if (store.isPresent(address, length)) present += length;
      }
    }
    found.push({
      mount_id: image.id,
      path: [...image.holders.keys()][0] ?? image.path,
      layers: image.layers.map((layer) => layer.digest),
      total_bytes: total,
      present_bytes: present,
      transport: image.direct ? 'direct' : transport,
      reference: [...image.holders.values()][0] ?? '',
    });
  }
  return found;
}
