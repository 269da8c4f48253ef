// Follows an answer as it grows, and lets go as soon as the reader scrolls up.

const NEAR_PX = 4 // a fraction of a pixel is lost to rounding

export class Follower {
  constructor(log, button) {
    this.log = log
    this.button = button
    this.isFollowing = true
    this.lastTop = 0
    log.addEventListener('scroll', () => this.onScroll(), { passive: true })
    button.addEventListener('click', () => {
      this.toEnd()
      log.focus({ preventScroll: true }) // the button is about to vanish with the focus on it
    })
    new ResizeObserver(() => this.grow()).observe(log)
  }

  get isAtEnd() {
    return this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < NEAR_PX
  }

  onScroll() {
    // up by a hair lets go, or a slow finger could not leave; content that shrinks moves the top too, but to the very end
    const { scrollTop, scrollHeight, clientHeight } = this.log
    if (scrollTop < this.lastTop && scrollHeight - scrollTop - clientHeight > 1) this.isFollowing = false
    else if (this.isAtEnd) this.isFollowing = true
    this.lastTop = this.log.scrollTop
    this.button.hidden = this.isAtEnd
  }

  /** Content was added. */
  grow() {
    if (this.isFollowing) this.log.scrollTop = this.log.scrollHeight
    this.button.hidden = this.isAtEnd
    this.lastTop = this.log.scrollTop
  }

  get top() {
    return this.isFollowing ? null : this.log.scrollTop
  }

  backTo(top) {
    this.log.scrollTop = top
    this.onScroll()
  }

  toEnd() {
    this.isFollowing = true
    this.grow()
  }
}
